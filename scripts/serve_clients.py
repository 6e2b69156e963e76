#!/usr/bin/env python3
"""OpenAI's own Python client and curl on `lapidary serve`, with the tiny model of the tests.

Usage: scripts/serve_clients.py LAPIDARY        (pip install openai; curl on the path)
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import openai

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'][0] }}{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)


def package(program, folder):
    """The model of 97 tokens with a tokenizer that fits it: special tokens and the characters of ASCII."""
    files = folder / "tokenizer"
    files.mkdir()
    tokenizer = json.loads((ROOT / "fixtures/smollm2/tokenizer.json").read_text())
    letters = ["\u0120", *(chr(c) for c in range(ord("!"), ord("}") + 1))]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters]
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    tokenizer["model"]["merges"] = []
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    (files / "tokenizer.json").write_text(json.dumps(tokenizer))
    (files / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    model = ROOT / "fixtures/exports/llama-optimum/model.onnx"
    command = [program, "convert", model, "-o", folder / "tiny", "--capacity", "64,256", "--tokenizer", files]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "tiny"


def check(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 16, "seed": 5, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, n=2)
    first = whole.choices[0]
    assert first.message.role == "assistant" and first.finish_reason == "length" and len(whole.choices) == 2
    assert len(first.logprobs.content) == 16 and len(first.logprobs.content[0].top_logprobs) == 2
    assert whole.usage.completion_tokens == 32 and whole.usage.total_tokens == whole.usage.prompt_tokens + 32
    text, usage = "", None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == first.message.content, (text, first.message.content)
    assert usage.completion_tokens == 16
    completion = client.completions.create(model="tiny", prompt=["ab", "cd"], max_tokens=4, temperature=0, logprobs=1, stop="~")
    assert len(completion.choices) == 2 and len(completion.choices[1].logprobs.tokens) <= 4
    pieces = client.completions.create(model="tiny", prompt="cd", max_tokens=4, temperature=0, stream=True, stop="~")
    assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[1].text
    for wrong, error in [
        (lambda: client.chat.completions.create(model="other", messages=messages), openai.NotFoundError),
        (lambda: client.completions.create(model="tiny", prompt="a" * 300), openai.BadRequestError),
        (lambda: client.completions.create(model="tiny", prompt="a", temperature=-1), openai.BadRequestError),
        (lambda: client.embeddings.create(model="tiny", input="x"), openai.InternalServerError),
        (lambda: client.with_options(api_key="wrong").models.list(), openai.AuthenticationError),
    ]:
        try:
            wrong()
        except error as refused:
            assert refused.body["message"], refused
        else:
            raise AssertionError(f"not refused with {error.__name__}")


def main():
    program = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        keys = folder / "keys"
        keys.write_text("a-key\n")
        command = [program, "serve", package(program, folder), "--port", "0", "--device", "cpu", "--api-key-file", keys]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = server.stdout.readline().removeprefix("listening on ").split(",")[0]
            check(openai.OpenAI(base_url=f"{address}/v1", api_key="a-key", max_retries=0))
            curl = ["curl", "-sS", "--fail-with-body", f"{address}/v1/completions", "-H", "Authorization: Bearer a-key"]
            body = json.dumps({"prompt": "ab", "max_tokens": 2, "stream": True, "ignore_eos": True})
            answer = subprocess.run([*curl, "-d", body], check=True, capture_output=True, text=True).stdout
            assert answer.endswith("data: [DONE]\n\n"), answer
        finally:
            server.terminate()
            assert server.wait(60) == 0
    print(f"openai {openai.__version__} and curl are served")


if __name__ == "__main__":
    main()
