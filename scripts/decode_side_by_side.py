#!/usr/bin/env python3
"""Time per output token and time to first token of two `lapidary` binaries on the CPU, in turn, in one run.

    python scripts/decode_side_by_side.py OLD NEW PACKAGE_OF_OLD PACKAGE_OF_NEW [--runs 15] [--output FILE]

Each run is a process that generates 64 tokens after a prompt of 128. Prints the medians and the median of the ratios
NEW/OLD of neighboring runs as JSON. Needs only Python.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path

PROMPT = ",".join(str(i % 1000 + 5) for i in range(128))


def measure(binary, package):
    done = subprocess.run(
        [binary, "generate", package, "--prompt-ids", PROMPT, "--max-new-tokens", "64", "--ignore-eos"]
        + ["--temperature", "0", "--device", "cpu", "--json"],
        capture_output=True, text=True, check=True,
    )
    timing = json.loads(done.stdout)["timing"]
    return {"tpot_ms": timing["tpot_ms"], "ttft_ms": timing["ttft_ms"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old", "new", "old_package", "new_package"):
        parser.add_argument(name)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    pairs = []
    for run in range(arguments.runs + 1):
        pair = [measure(arguments.old, arguments.old_package), measure(arguments.new, arguments.new_package)]
        # The first pair warms the page cache.
        if run:
            pairs.append(pair)
    found = {"runs": arguments.runs, "prompt_length": 128, "new_tokens": 64}
    for name in ("tpot_ms", "ttft_ms"):
        found[name] = {
            "old": statistics.median(old[name] for old, _ in pairs),
            "new": statistics.median(new[name] for _, new in pairs),
            "ratio": statistics.median(new[name] / old[name] for old, new in pairs),
        }
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
