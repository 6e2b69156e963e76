#!/usr/bin/env python3
"""Random clients on a server: checks for wrong tokens, memory leaks and requests that do not end.

Usage: scripts/serve_soak.py LAPIDARY PKG [--device cpu] [--seconds 1800] [--clients 12] [--seed 1]

Starts two servers of the package: one for many clients, one that takes one request at a time and keeps no prefix. Clients ask for
completions of token ids: random lengths, many with a prefix in common, greedy and seeded, streamed and whole, one or two choices; some disconnect
early. Every complete answer is compared, token by token, with the second server's. Memory is read once per second: after the
first tenth of the time it may grow by a tenth. Needs only Python's standard library, and Linux.
"""

import argparse
import http.client
import json
import random
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


def tokens(document_or_events, choices):
    found = [[] for _ in range(choices)]
    for document in document_or_events:
        if "error" in document:
            raise RuntimeError(document["error"]["message"])
        for choice in document["choices"]:
            found[choice["index"]] += choice.get("token_ids", [])
    return found


class Soak:
    def __init__(self, arguments):
        device = ["--device", arguments.device]
        self.crowd = Server(arguments.program, arguments.package, *device, "--max-sequences", "6", "--prefill-chunk", "16")
        self.lone = Server(
            arguments.program, arguments.package, *device, "--max-sequences", "1", "--prefill-chunk", "16", "--kept-prefixes", "0"
        )
        models = json.loads(self.crowd.get("/v1/models"))
        self.longest = models["data"][0]["max_model_len"]
        self.end = time.time() + arguments.seconds
        self.seconds = arguments.seconds
        self.lock = threading.Lock()
        self.counts = {"compared": 0, "left": 0, "refused": 0}
        self.wrong = []

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def client(self, seed):
        rng = random.Random(seed)
        while time.time() < self.end and not self.wrong:
            try:
                self.ask(rng)
            except Exception as error:  # noqa: BLE001
                self.wrong.append(f"client {seed}: {error!r}")

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
        }
        connection, response = self.crowd.post(body)
        if response.status == 429:
            self.count("refused")
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
            found = tokens(documents, body["n"])
        else:
            found = tokens([json.loads(response.read())], body["n"])
        connection.close()
        body["stream"] = False
        connection, response = self.lone.post(body)
        document = json.loads(response.read())
        connection.close()
        expected = tokens([document], body["n"])
        if found != expected:
            raise RuntimeError(f"other tokens for {body}: {found} and not {expected}")
        self.count("compared")

    def run(self, clients, seed):
        threads = [threading.Thread(target=self.client, args=(seed * 1000 + i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        start, base, most = time.time(), None, 0.0
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            resident = self.crowd.resident()
            if base is None and time.time() - start > self.seconds / 10:
                base = resident
            most = max(most, resident)
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
        print(f"{self.counts}; memory {base:.0f} MB after a tenth of the time, {most:.0f} MB at most, {self.crowd.resident():.0f} MB at the end")
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
    arguments = parser.parse_args()
    Soak(arguments).run(arguments.clients, arguments.seed)


if __name__ == "__main__":
    main()
