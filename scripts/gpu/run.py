#!/usr/bin/env python3
"""The stages of host.sh. Each writes $OUT/gpu-STAGE.json as it goes."""

import os
import sys
import time
from pathlib import Path

import bench
import embeddings
import experts
import families
import kernels
import models
import quantized
import refit
import suite
import tiny
from common import BIN, Results, WORK, machine, note, run

TINY = ("llama", "gpt2", "mistral", "qwen2", "qwen3")

STAGES = {
    "tiny": lambda results: results.attempt("tiny", tiny.main, TINY),
    # In a minute: what is bound does not take long to build.
    "tiny-bound": lambda results: results.attempt("tiny", tiny.main, TINY, [m for m in tiny.MODES if m.startswith("bind")]),
    "quick": lambda results: results.attempt("tiny", tiny.main, ("llama",), only_first=1),
    "quantized": lambda results: results.attempt("quantized", quantized.main),
    "families": lambda results: results.attempt("families", families.main),
    "embeddings": lambda results: embeddings.stage(results),
    "experts": lambda results: results.attempt("experts", experts.main),
    "kernels": lambda results: results.attempt("kernels", kernels.main),
    "decode-steps": lambda results: decode_steps(results),
    "suite": lambda results: results.attempt("suite", suite.main),
    "forms": lambda results: results.attempt("forms", lambda: run(BIN / "gpu_lab", "forms", timeout=400).splitlines()),
    "choices-1b": lambda results: choices(results, "--layers", "6"),
    "choices-8b": lambda results: choices(results, "--large", "--layers", "4"),
    "1b": lambda results: models.stage("1b", results),
    "8b": lambda results: models.stage("8b", results),
    "tune-1b": lambda results: models.tune("1b", results),
    "tune-tiny": lambda results: models.tune("tiny", results, capacities="64", prefill="16"),
    "refit-1b": lambda results: refit.stage("1b", results),
    "refit-tiny": lambda results: refit.stage("tiny", results),
    # The same without the package that takes back only its own weights.
    "refit-1b-brief": lambda results: refit.stage("1b", results, modes=("bind", "general")),
    "peers-prepare": lambda results: peers("peers-prepare", results),
    "peers": lambda results: peers("peers", results),
    "peers-serve": lambda results: peers("peers-serve", results),
    "1b-thorough": lambda results: models.stage("1b", results, thorough=True),
    **bench.STAGES,
}


def choices(results, *arguments):
    """What single choices of the lowering take; CHOICES names those that are asked for, by a part of their names."""
    listed = lambda: run(BIN / "gpu_lab", "choices", *arguments, "--only", os.environ.get("CHOICES", ""), timeout=400).splitlines()
    results.attempt("choices", listed)


def decode_steps(results):
    """Whole decode steps with synthetic weights, with kernels and without. STEPS keeps the cases whose names contain it; ROWS has
    the numbers of sequences of a step (1,4,8,16)."""
    steps = lambda: run(BIN / "gpu_lab", "kernels", os.environ.get("STEPS", ""), "--rows", os.environ.get("ROWS", "1"),
                        timeout=500).splitlines()  # fmt: skip
    results.attempt("decode_steps", steps)


def peers(stage, results):
    """Needs torch, which the other stages import late."""
    import peers

    peers.STAGES[stage](results)


def main():
    stages = sys.argv[1:] or ["tiny", "suite", "forms", "1b", "8b"]
    WORK.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LAPIDARY_CACHE", str(WORK / "cache"))
    for stage in stages:
        start = time.time()
        results = Results(Path(os.environ.get("OUT", ".")) / f"gpu-{stage}.json")
        results["machine"] = machine()
        STAGES[stage](results)
        results["seconds"] = time.time() - start
        note(stage, f"done in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
