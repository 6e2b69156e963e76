#!/usr/bin/env python3
"""Convert every export of a folder with the `lapidary` binary, generate, and compare with its reference.json.

    python scripts/check_exports.py target/release/lapidary fixtures/exports [/work/heldout ...]

Greedy tokens must be those of the reference, and the eight log-probabilities of every step within 1e-3 of it. Exports
in fp16 are compared with the same weights in fp32 arithmetic, to 2e-2; those in bf16, whose caches keep three bits
less, to 1e-1. Prints a line per export and a summary;
`--json FILE` writes the findings. Exit status 1 if any differs. Needs only Python.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

CAPACITY, PREFILL, LOGPROBS = 32, 16, 8
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


def log_softmax(row):
    largest = max(row)
    total = math.log(sum(math.exp(value - largest) for value in row))
    return [value - largest - total for value in row]


def run(*command):
    """stdout, or raise with the command's message."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"exit {done.returncode}: {' '.join(done.stderr.split())[-400:]}")
    return done.stdout


def reference_of(folder):
    """The reference, with rows computed from the file's weights in fp32 arithmetic where there are such."""
    for path in (folder / "reference.json", folder.parent / "reference.json"):
        if path.exists():
            reference = json.loads(path.read_text())
            prefix = "torch_" if "torch_step_logits" in reference else ""
            rows = [reference[prefix + "prefill_last_logits"], *reference.get(prefix + "step_logits", [])]
            # The samples under shared/ share one reference, which does not show the dtype.
            dtype = reference.get("dtype", "fp16" if "fp16" in folder.name else "fp32")
            return reference["prompt"], reference["greedy_tokens"], rows, TOLERANCES[dtype]
    raise RuntimeError("no reference.json")


def check(binary, folder, convert_options):
    prompt, tokens, rows, tolerance = reference_of(folder)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package"
        model = folder / "model.onnx"
        run(binary, "convert", model, "-o", package, "--target", "cpu", *convert_options)
        answer = json.loads(
            run(
                *(binary, "generate", package, "--prompt-ids", ",".join(map(str, prompt)), "--temperature", 0),
                *("--max-new-tokens", len(tokens), "--ignore-eos", "--logprobs", LOGPROBS, "--device", "cpu", "--json"),
            )
        )
    if answer["tokens"] != tokens:
        raise RuntimeError(f"tokens {answer['tokens']}, expected {tokens}")
    largest = 0.0
    for row, step in zip(rows, answer["steps"]):
        expected = log_softmax(row)
        largest = max(largest, *(abs(value - expected[token]) for token, value in step["top_logprobs"]))
    if largest > tolerance:
        raise RuntimeError(f"log-probabilities differ by {largest:.2e}, allowed {tolerance}")
    return largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("binary", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of export folders")
    parser.add_argument("--only", default="", help="only exports whose name contains this")
    parser.add_argument("--json", type=Path, help="write the findings here")
    parser.add_argument("--convert-options", default=f"--capacity {CAPACITY} --prefill {PREFILL}")
    arguments = parser.parse_args()
    findings = {}
    for root in arguments.folders:
        for model in sorted(root.glob("*/model.onnx")):
            folder = model.parent
            if arguments.only not in folder.name:
                continue
            try:
                largest = check(arguments.binary.resolve(), folder, arguments.convert_options.split())
                findings[str(folder)] = {"ok": True, "largest_difference": largest}
                print(f"ok    {folder.name}  {largest:.1e}", flush=True)
            except (RuntimeError, KeyError, ValueError) as error:
                findings[str(folder)] = {"ok": False, "error": f"{error}"}
                print(f"FAIL  {folder.name}  {error}", flush=True)
    failed = [name for name, finding in findings.items() if not finding["ok"]]
    print(f"{len(findings) - len(failed)} of {len(findings)} exports agree")
    if arguments.json:
        arguments.json.write_text(json.dumps(findings, indent=1) + "\n")
    return 1 if failed or not findings else 0


if __name__ == "__main__":
    sys.exit(main())
