#!/usr/bin/env python3
"""Convert every export of the given folders with two `lapidary` binaries and require equal packages and equal answers.

    python scripts/same_answers.py OLD NEW fixtures/exports [FOLDER ...] [--isa portable,avx2] [--dtype fp16]

For refactorings: the results must be bit-identical. Compared are the bytes of weights, constants and canonical graph,
the manifest without versions and times, and the JSON of `generate` (greedy and seeded, with log-probabilities) without
times. An export that the old binary refuses must be refused by the new one; the messages may differ. Prints a line for
each difference and a summary. Exit status 1 if anything differs. Needs only Python.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CAPACITY, PREFILL, NEW_TOKENS, LOGPROBS = 64, 16, 8, 8
# Lengths: one token, less than a chunk, a chunk, more than one chunk.
PROMPTS = [1, 5, 16, 21]
SAMPLERS = [["--temperature", "0", "--seed", "7"], ["--temperature", "0.9", "--seed", "7", "--dry-multiplier", "0.8"]]
FILES = ["graph.onnx", "weights.safetensors", "constants.safetensors"]
# Fields of a manifest with the date and version of the writer.
VARYING = {"lapidary_version", "passes"}


def run(binary, *arguments, isa=None):
    environment = dict(os.environ, **({"LAPIDARY_CPU_ISA": isa} if isa else {}))
    command = [str(binary), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def prompt(length):
    return ",".join(str((7 * i + 3) % 96) for i in range(length))


def answers(binary, package, isa):
    found = {}
    for length in PROMPTS:
        for sampler in SAMPLERS:
            done = run(
                *(binary, "generate", package, "--prompt-ids", prompt(length), *sampler, "--device", "cpu", "--json"),
                *("--max-new-tokens", NEW_TOKENS, "--ignore-eos", "--logprobs", LOGPROBS),
                isa=isa,
            )
            key = f"prompt of {length}, {' '.join(sampler)}"
            if done.returncode != 0:
                found[key] = "refused"
            else:
                answer = json.loads(done.stdout)
                answer.pop("timing")
                found[key] = answer
    return found


def package_of(binary, model, package, options):
    done = run(
        *(binary, "convert", model, "-o", package, "--target", "cpu", "--capacity", CAPACITY, "--prefill", PREFILL),
        *options,
    )
    if done.returncode != 0:
        return None
    facts = {}
    for name in FILES:
        path = package / name
        facts[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    manifest = json.loads((package / "manifest.json").read_text())
    facts.update({key: value for key, value in manifest.items() if key not in VARYING})
    return facts


def compare(old, new, model, options, isas):
    with tempfile.TemporaryDirectory() as scratch:
        packages = [Path(scratch) / "old", Path(scratch) / "new"]
        before, after = (package_of(b, model, p, options) for b, p in zip((old, new), packages))
        if before is None or after is None:
            same = before is None and after is None
            return ["refused"] if same else ["one refuses it, the other does not"]
        # A field that only the new format has is an addition, not a difference.
        differences = [f"package: {key}" for key in before if before[key] != after.get(key)]
        for isa in isas:
            first, second = answers(old, packages[0], isa), answers(new, packages[1], isa)
            differences += [f"{isa or 'best ISA'}: {key}" for key in first if first[key] != second[key]]
        # Packages of the old binary stay readable.
        if answers(new, packages[0], None) != answers(old, packages[0], None):
            differences.append("the old binary's package in the new one")
        return differences


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--isa", default="", help="also with these values of LAPIDARY_CPU_ISA, separated by commas")
    parser.add_argument("--dtype", help="convert to this dtype")
    arguments = parser.parse_args()
    isas = [None, *filter(None, arguments.isa.split(","))]
    options = ["--dtype", arguments.dtype] if arguments.dtype else []
    models = sorted(m for folder in arguments.folders for m in folder.rglob("*.onnx"))
    counts = {"equal": 0, "refused by both": 0, "different": 0}
    for model in models:
        differences = compare(arguments.old, arguments.new, model, options, isas)
        if differences == ["refused"]:
            counts["refused by both"] += 1
        elif differences:
            counts["different"] += 1
            print(f"{model}: {'; '.join(differences)}", flush=True)
        else:
            counts["equal"] += 1
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    sys.exit(1 if counts["different"] or not counts["equal"] else 0)


if __name__ == "__main__":
    main()
