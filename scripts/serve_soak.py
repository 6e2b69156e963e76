#!/usr/bin/env python3
"""Random clients on a server: checks for wrong tokens, memory leaks and requests that do not end.

Usage: scripts/serve_soak.py LAPIDARY PKG [--device cpu] [--seconds 1800] [--clients 12] [--seed 1] [--threads N] [--output FILE]

Starts two servers of the package: one for many clients, one that takes one request at a time and keeps no prefix. Clients ask for
completions of token ids: random lengths, many with a prefix in common, greedy and seeded, streamed and whole, one or two choices, some with
log-probabilities, some in the form of a JSON schema if the package has a tokenizer. Some disconnect early, in the answer or in their own
body, and some send what is to be refused. Every complete answer is compared with the second server's: token by token, with reasons of ends
and log-probabilities. Memory is read once per second: after the first tenth of the time it may grow by a tenth. Needs only Python's
standard library, and Linux.
"""

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time


class Server:
    def __init__(self, program, package, *flags):
        command = [program, "serve", package, "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("listening on http://"):
            sys.exit(f"the server did not start: {line!r}")
        self.address = line.removeprefix("listening on http://").split(",")[0]

    def post(self, body):
        connection = http.client.HTTPConnection(self.address, timeout=300)
        connection.request("POST", "/v1/completions", json.dumps(body))
        return connection, connection.getresponse()

    def get(self, path):
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def resident(self):
        """Megabytes."""
        with open(f"/proc/{self.process.pid}/status") as status:
            line = next(line for line in status if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024

    def stop(self):
        self.process.terminate()
        return self.process.wait(60)


def events(response):
    """Documents of a stream, as they come."""
    for line in response:
        line = line.decode().strip()
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def give(result, output):
    """Prints a result as JSON and writes it to a file, if one is named."""
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        with open(output, "w") as file:
            file.write(text + "\n")


def compared(documents, choices):
    """Of each choice: tokens, the reason of its end, log-probabilities."""
    found = [{"tokens": [], "reason": None, "logprobs": []} for _ in range(choices)]
    for document in documents:
        if "error" in document:
            raise RuntimeError(document["error"]["message"])
        for choice in document["choices"]:
            one = found[choice["index"]]
            one["tokens"] += choice.get("token_ids", [])
            one["reason"] = choice["finish_reason"] or one["reason"]
            one["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
    return found


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2, 3]}, "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
# Bodies, and the statuses that refuse them.
REFUSED = [
    (b"{", 400),
    (b"[" * 100_000, 400),
    (b'{"prompt": [5], "bogus": 1}', 400),
    (b'{"prompt": [5], "n": 100000}', 400),
    (b'{"prompt": [99999999]}', 400),
    (b'{"prompt": [5], "json_schema": {"type": "nothing"}}', 400),
    (b'{"prompt": [5], "model": "unknown"}', 404),
    (b'{"prompt": "' + b"x" * (5 << 20) + b'"}', 413),
]


class Soak:
    def __init__(self, arguments):
        flags = ["--device", arguments.device, "--prefill-chunk", "16"]
        flags += ["--threads", str(arguments.threads)] if arguments.threads else []
        self.crowd = Server(arguments.program, arguments.package, *flags, "--max-sequences", "6")
        self.lone = Server(arguments.program, arguments.package, *flags, "--max-sequences", "1", "--kept-prefixes", "0", "--queue", "1000")
        models = json.loads(self.crowd.get("/v1/models"))
        self.longest = models["data"][0]["max_model_len"]
        # Token ids of other texts would do, too.
        connection = http.client.HTTPConnection(self.crowd.address, timeout=60)
        connection.request("POST", "/tokenize", json.dumps({"content": "x"}))
        self.has_tokenizer = connection.getresponse().status == 200
        self.end = time.time() + arguments.seconds
        self.seconds = arguments.seconds
        self.lock = threading.Lock()
        self.counts = {"compared": 0, "tokens": 0, "left": 0, "refused": 0, "queue full": 0}
        self.wrong = []

    def count(self, what, by=1):
        with self.lock:
            self.counts[what] += by

    def client(self, seed):
        rng = random.Random(seed)
        while time.time() < self.end and not self.wrong:
            try:
                kind = rng.random()
                if kind < 0.03:
                    self.ask_wrongly(rng)
                elif kind < 0.05:
                    self.leave_in_the_body(rng)
                else:
                    self.ask(rng)
            except Exception as error:  # noqa: BLE001
                self.wrong.append(f"client {seed}: {error!r}")

    def ask_wrongly(self, rng):
        body, expected = rng.choice(REFUSED)
        connection = http.client.HTTPConnection(self.crowd.address, timeout=300)
        connection.request("POST", "/v1/completions", body)
        response = connection.getresponse()
        message = json.loads(response.read())["error"]["message"]
        connection.close()
        if response.status != expected:
            raise RuntimeError(f"{body[:60]}: status {response.status} and not {expected}: {message}")
        self.count("refused")

    def leave_in_the_body(self, rng):
        host, port = self.crowd.address.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as stream:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
            stream.sendall(head.encode() + b"{" * rng.randrange(0, 99_999))
        self.count("left")

    def ask(self, rng):
        most = min(self.longest, 120)
        shared = [(7 * i + 3) % 90 + 3 for i in range(rng.choice([0, 0, 16, 32, 48]))]
        own = [rng.randrange(3, 93) for _ in range(rng.randrange(1, most - len(shared) - 40))]
        body = {
            "prompt": shared + own,
            "max_tokens": rng.randrange(1, 40),
            "ignore_eos": True,
            "return_token_ids": True,
            "seed": rng.randrange(1 << 30),
            "temperature": rng.choice([0, 0.8, 1.5]),
            "n": rng.choice([1, 1, 1, 2]),
            "stream": rng.random() < 0.5,
            "logprobs": rng.choice([None, None, 0, 3]),
        }
        if self.has_tokenizer and rng.random() < 0.1:
            body |= {"json_schema": SCHEMA, "logprobs": None}
        connection, response = self.crowd.post(body)
        if response.status == 429:
            self.count("queue full")
            time.sleep(0.2)
            return
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read().decode()}")
        if body["stream"]:
            leaves_after = rng.randrange(1, 8) if rng.random() < 0.3 else None
            documents = []
            for document in events(response):
                documents.append(document)
                if leaves_after is not None and len(documents) >= leaves_after:
                    connection.close()
                    response.close()
                    self.count("left")
                    return
            found = compared(documents, body["n"])
        else:
            found = compared([json.loads(response.read())], body["n"])
        connection.close()
        body["stream"] = False
        connection, response = self.lone.post(body)
        document = json.loads(response.read())
        connection.close()
        expected = compared([document], body["n"])
        if found != expected:
            raise RuntimeError(f"other tokens for {body}: {found} and not {expected}")
        self.count("compared")
        self.count("tokens", sum(len(one["tokens"]) for one in found))

    def run(self, clients, seed, output):
        threads = [threading.Thread(target=self.client, args=(seed * 1000 + i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        start, base, most, memory = time.time(), None, 0.0, []
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            resident = self.crowd.resident()
            if base is None and time.time() - start > self.seconds / 10:
                base = resident
            most = max(most, resident)
            if len(memory) < 10 and time.time() - start > len(memory) * self.seconds / 10:
                memory.append(round(resident, 1))
        for thread in threads:
            thread.join()
        deadline = time.time() + 30
        while "vllm:num_requests_running" in (page := self.crowd.get("/metrics")):
            running = [line for line in page.splitlines() if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))]
            if all(line.endswith(" 0") for line in running):
                break
            if time.time() > deadline:
                self.wrong.append(f"requests are left: {running}")
                break
            time.sleep(0.1)
        memory.append(round(self.crowd.resident(), 1))
        result = {"seconds": round(time.time() - start), "clients": clients, "seed": seed, "capacity": self.longest, **self.counts}
        give({**result, "wrong": len(self.wrong), "memory_mb": memory, "memory_mb_most": round(most, 1)}, output)
        if most > 1.1 * base + 8:
            self.wrong.append(f"memory grew from {base:.0f} to {most:.0f} MB")
        if self.counts["compared"] == 0:
            self.wrong.append("nothing was compared")
        for server in (self.crowd, self.lone):
            status = server.stop()
            if status != 0:
                self.wrong.append(f"a server ended with status {status}")
        if self.wrong:
            sys.exit("\n".join(self.wrong))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("package")
    parser.add_argument("--device", default="cpu", help="of both servers [default: cpu]")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of each server [default: all cores]")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    Soak(arguments).run(arguments.clients, arguments.seed, arguments.output)


if __name__ == "__main__":
    main()
