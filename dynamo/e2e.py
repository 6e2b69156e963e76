#!/usr/bin/env python3
"""A Dynamo frontend and two Lapidary workers on this machine, without other services: responses, refusals,
cancellation, and a worker that is killed during streams.

Usage: e2e.py WORKER PKG [--long N]     (with a Python that has ai-dynamo; scripts/test_dynamo.sh installs it)

`--long`: tokens of the answers during which a worker is killed. WORKER is `lapidary-dynamo`, PKG a package with a tokenizer.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

HOST = "127.0.0.1"
PROMPTS = ["Hello", "What is a lapidary?", "One, two, three", "Once upon a time"]


def free_port():
    """Dynamo reads DYN_SYSTEM_PORT as a signed number of 16 bits."""
    while True:
        port = random.randrange(10000, 32768)
        with socket.socket() as listener:
            try:
                listener.bind((HOST, port))
                return port
            except OSError:
                continue


class Deployment:
    def __init__(self, arguments, folder):
        self.arguments, self.folder, self.processes = arguments, folder, []
        self.port = free_port()
        self.environment = dict(
            os.environ,
            # Without these hosts some sockets are bound to every address of the machine.
            DYN_TCP_RPC_HOST=HOST,
            DYN_TCP_RESPONSE_STREAM_HOST=HOST,
            DYN_EVENT_PLANE_HOST=HOST,
            DYN_SYSTEM_HOST=HOST,
            DYN_DISCOVERY_BACKEND="file",
            DYN_FILE_KV=str(folder / "kv"),
            DYN_REQUEST_PLANE="tcp",
            DYN_EVENT_PLANE="zmq",
            DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS="0.5",
            DYN_LOG="info",
            HF_HUB_OFFLINE="1",
            HOME=str(folder),
        )

    def start(self, name, command, **environment):
        log = open(self.folder / f"{name}.log", "w")
        process = subprocess.Popen(command, env={**self.environment, **environment}, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_frontend(self):
        command = [sys.executable, "-m", "dynamo.frontend", "--http-host", HOST, "--http-port", str(self.port)]
        return self.start("frontend", [*command, "--migration-limit", "3"])

    def start_worker(self, name):
        port = free_port()
        command = [self.arguments.worker, self.arguments.package, "--served-model-name", "lap", "--device", "cpu", "--threads", "1"]
        return self.start(name, [*command, "--prefill-chunk", "16"], DYN_SYSTEM_PORT=str(port)), port

    def get(self, path, port=None):
        with urllib.request.urlopen(f"http://{HOST}:{port or self.port}{path}", timeout=10) as reply:
            return reply.read().decode()

    def post(self, path, **body):
        body = json.dumps({"model": "lap", **body}).encode()
        request = urllib.request.Request(f"http://{HOST}:{self.port}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stream(self, path, seen=None, **body):
        """Text, reason and tokens of a streamed answer. `seen` is called after each piece."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=300)
        body = {"model": "lap", "stream": True, "stream_options": {"include_usage": True}, **body}
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        text, reason, count = "", None, None
        for line in response:
            line = line.decode().strip()
            if line == "data: [DONE]":
                return text, reason, count
            if not line.startswith("data: "):
                assert not line.startswith("event: error"), line
                continue
            document = json.loads(line.removeprefix("data: "))
            assert "error" not in document, document
            for choice in document.get("choices", []):
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                reason = choice.get("finish_reason") or reason
            count = (document.get("usage") or {}).get("completion_tokens", count)
            if seen:
                seen()
        raise AssertionError(f"the stream ended without [DONE], after {text!r}")

    def end(self):
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def until(what, holds, seconds=120):
    end = time.time() + seconds
    while time.time() < end:
        try:
            if holds():
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


def metric(page, name, *labels):
    """The sum of a metric's lines that have these labels."""
    lines = [line for line in page.splitlines() if line.startswith(f"{name}{{") and all(label in line for label in labels)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


class Checks:
    def __init__(self):
        self.passed = 0

    def __call__(self, what, holds, *details):
        if not holds:
            raise AssertionError(" ".join([what, *map(str, details)]))
        self.passed += 1
        print(f"ok {what}", flush=True)


def run(deployment, check, long):
    began = time.time()
    deployment.start_frontend()
    workers = [deployment.start_worker(f"worker{i}") for i in (1, 2)]
    until("two workers", lambda: len(json.loads(deployment.get("/health"))["instances"]) == 2)
    until("the model", lambda: '"lap"' in deployment.get("/v1/models"))
    print(f"up after {time.time() - began:.1f} s", flush=True)
    greedy = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    message = {"messages": [{"role": "user", "content": "Hello"}]}

    status, whole = deployment.post("/v1/chat/completions", **message, **greedy)
    check("chat", status == 200 and whole["usage"]["completion_tokens"] == 12, status, whole)
    text = whole["choices"][0]["message"]["content"]
    check("text, not token ids", isinstance(text, str) and text, whole)
    check("chat as a stream", deployment.stream("/v1/chat/completions", **message, **greedy)[:2] == (text, "length"))
    status, document = deployment.post("/v1/completions", prompt="Hello", **greedy)
    check("completions", status == 200 and document["choices"][0]["finish_reason"] == "length", status, document)
    status, _ = deployment.post("/v1/completions", **{"model": "nothing", "prompt": "Hello"})
    check("an unknown model is 404", status == 404, status)

    drawn = {"temperature": 1.0, "seed": 5, "max_tokens": 30, "ignore_eos": True}
    both = [deployment.post("/v1/completions", prompt="Hello", **drawn)[1]["choices"][0]["text"] for _ in workers]
    check("a seed means the same on both workers", both[0] == both[1], both)
    logs = deployment.post("/v1/completions", prompt="Hello", logprobs=2, **greedy)
    check("log-probabilities", logs[0] == 200 and len(logs[1]["choices"][0]["logprobs"]["token_logprobs"]) == 12, logs)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    status, document = deployment.post("/v1/chat/completions", **message, max_tokens=80, temperature=0, response_format=form)
    check("structured output", status == 200, status, document)
    check("of its schema", json.loads(document["choices"][0]["message"]["content"])["a"] in (1, 2), document)

    for name, body in [
        ("a prompt over the context", {"prompt": "hello " * 20000, "max_tokens": 5}),
        ("n", {"prompt": "Hello", "n": 2, "max_tokens": 5}),
        ("best_of", {"prompt": "Hello", "best_of": 2, "max_tokens": 5}),
        ("top_p", {"prompt": "Hello", "top_p": 7.0, "max_tokens": 5}),
    ]:
        status, why = deployment.post("/v1/completions", **body)
        check(f"{name} is refused", 400 <= status < 500, status, why)
        print("  ", str(why)[:150], flush=True)

    connection = http.client.HTTPConnection(HOST, deployment.port, timeout=60)
    body = {"model": "lap", "prompt": "Hello", "max_tokens": long, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().readline()
    pages = lambda: [deployment.get("/metrics", port) for _, port in workers]
    running = lambda: sum(metric(page, "vllm:num_requests_running") for page in pages())
    until("it runs", lambda: running() == 1)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    cancelled = lambda: sum(metric(page, "vllm:request_success_total", 'finished_reason="cancelled"') for page in pages())
    until("a client that goes ends its request", lambda: cancelled() >= 1 and running() == 0)
    check("a client that goes ends its request", True)
    check("the router's numbers", all("dynamo_component_" in page for page in pages()))

    # First one at a time, then all at once while a worker is killed.
    asked = [{"prompt": prompt, "max_tokens": long, "ignore_eos": True} for prompt in PROMPTS]
    for i, body in enumerate(asked):
        body.update({"temperature": 0} if i % 2 == 0 else {"temperature": 1.0, "seed": i})
    alone = [deployment.stream("/v1/completions", **body) for body in asked]
    check("long answers alone", all(count == long for _, _, count in alone), [count for _, _, count in alone])
    # Structured texts, as many as workers; the router says where each goes. The frontend does not move those, since a moved
    # request does not say which tokens belong to the answer.
    # Models that write one character a token take ten of them for an element with its blanks, and the context must hold all.
    items = max(long // 20, 8)
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": items, "maxItems": items}
    formed = {**message, "temperature": 0, "max_tokens": 100 * items, "response_format":
              {"type": "json_schema", "json_schema": {"name": "b", "schema": schema}}}  # fmt: skip
    formed_alone = deployment.stream("/v1/chat/completions", **formed)
    check("a long text of a form alone", len(json.loads(formed_alone[0])) == items, formed_alone)
    pieces = [0] * (len(asked) + len(workers))
    partial = {}

    def streamed(i):
        def seen():
            pieces[i] += 1

        return deployment.stream("/v1/completions", seen, **asked[i])

    def streamed_of_a_form(i):
        def seen():
            pieces[i] += 1

        try:
            return deployment.stream("/v1/chat/completions", seen, **formed)
        except AssertionError as error:
            partial[i] = str(error)
            return None

    with concurrent.futures.ThreadPoolExecutor(len(pieces)) as pool:
        answers = [pool.submit(streamed, i) for i in range(len(asked))]
        formed_answers = [pool.submit(streamed_of_a_form, len(asked) + i) for i in range(len(workers))]
        until("every stream has begun", lambda: min(pieces) > 3)
        victim, port = max(workers, key=lambda worker: metric(deployment.get("/metrics", worker[1]), "vllm:num_requests_running"))
        held = metric(deployment.get("/metrics", port), "vllm:num_requests_running")
        victim.send_signal(signal.SIGKILL)
        answers = [answer.result() for answer in answers]
        formed_answers = [answer.result() for answer in formed_answers]
    check("the killed worker had streams", held > 0)
    page = deployment.get("/metrics")
    moved = metric(page, "dynamo_frontend_model_migration_total", 'migration_type="ongoing_request"')
    # The frontend may count a text of a form that it gave up.
    check("they moved to the other worker", held - len(partial) <= moved <= held, moved, held, partial)
    whole = [answer for answer in formed_answers if answer]
    check("texts of a form are whole, or end in an error", all(answer == formed_alone for answer in whole), whole, formed_alone)
    for error in partial.values():
        print("  ", error[:150], flush=True)
    for i, (answer, lone) in enumerate(zip(answers, alone)):
        check(f"answer {i + 1} is that of a lone run", answer == lone, answer, lone)

    until("the dead worker is gone", lambda: len(json.loads(deployment.get("/health"))["instances"]) == 1)
    left = next(process for process, _ in workers if process is not victim)
    left.terminate()
    check("a worker ends by SIGTERM with status 0", left.wait(60) == 0, left.returncode)
    until("and leaves", lambda: not json.loads(deployment.get("/health"))["instances"])
    print(f"{check.passed} passed, 0 failed, in {time.time() - began:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("worker")
    parser.add_argument("package")
    parser.add_argument("--long", type=int, default=4000)
    arguments = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="lapidary-dynamo-"))
    deployment = Deployment(arguments, folder)
    try:
        run(deployment, Checks(), arguments.long)
    except BaseException as error:
        print(f"FAILED: {error}\nlogs: {folder}", file=sys.stderr, flush=True)
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}", *log.read_text().splitlines()[-15:], sep="\n", file=sys.stderr)
        sys.exit(1)
    finally:
        deployment.end()


main()
