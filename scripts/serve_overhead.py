#!/usr/bin/env python3
"""One client of `lapidary serve` beside `lapidary generate`: the same prompt, greedy, alternating, on the CPU.

Usage: scripts/serve_overhead.py LAPIDARY PKG [--prompt 128] [--tokens 128] [--rounds 7] [--threads N] [--output FILE]

Time to first token and time per output token of both, medians over the rounds, and the ratios of the server to `generate`. The server's
times are a client's: from the request to the first event of the stream, and from there to the last one. `generate` reports its own,
without its load. The server keeps no prefix, so every request computes its prompt. Tokens must be equal. Needs only Python's standard library.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from serve_soak import Server, events, give


def served(server, ids, count):
    start = time.perf_counter()
    body = {"prompt": ids, "max_tokens": count, "temperature": 0, "stream": True, "ignore_eos": True, "return_token_ids": True}
    _, response = server.post(body)
    tokens, times = [], []
    for event in events(response):
        if "error" in event:
            sys.exit(f"the server answered {event['error']}")
        new = [token for choice in event["choices"] for token in choice.get("token_ids") or []]
        if new:
            tokens += new
            times.append(time.perf_counter())
    return tokens, 1e3 * (times[0] - start), 1e3 * (times[-1] - times[0]) / (count - 1)


def generated(program, package, ids, count, extra):
    command = [program, "generate", package, "--prompt-ids", ",".join(map(str, ids)), "--max-new-tokens", str(count), "--temperature", "0",
               "--ignore-eos", "--device", "cpu", "--json", *extra]  # fmt: skip
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    timing = answer["timing"]
    return answer["tokens"], timing["ttft_ms"], timing["tpot_ms"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lapidary")
    parser.add_argument("package")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of both [default: all cores]")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    ids = [100 + i * 7 % 4000 for i in range(arguments.prompt)]
    server = Server(arguments.lapidary, arguments.package, "--device", "cpu", "--max-sequences", "1", "--kept-prefixes", "0", *threads)
    rounds = {"serve": [], "generate": []}
    try:
        served(server, ids, arguments.tokens)
        for _ in range(arguments.rounds):
            over_http = served(server, ids, arguments.tokens)
            alone = generated(arguments.lapidary, arguments.package, ids, arguments.tokens, threads)
            if over_http[0] != alone[0]:
                sys.exit("the server's tokens are not those of generate")
            rounds["serve"].append(over_http[1:])
            rounds["generate"].append(alone[1:])
    finally:
        server.stop()
    result = {"prompt": arguments.prompt, "tokens": arguments.tokens, "rounds": arguments.rounds}
    for i, name in enumerate(("ttft_ms", "tpot_ms")):
        medians = {system: statistics.median(entry[i] for entry in entries) for system, entries in rounds.items()}
        result[name] = medians | {"ratio": medians["serve"] / medians["generate"]}
        result[f"{name}_samples"] = {system: [entry[i] for entry in entries] for system, entries in rounds.items()}
    give(result, arguments.output)


if __name__ == "__main__":
    main()
