#!/usr/bin/env python3
"""Quantized models on the GPU, in every weight mode: against the CPU executor on the same package, with the prompt in
one run on both, since dynamically quantized activations have the range of a run.

Small exports of fixtures/exports quantized by `convert --quantize`, and exports that are quantized already: those that pack.sh
took along from .gpu/quantized, one folder each. Tokens may differ where the CPU's two best are closer than the limit.
"""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import ROOT, WORK, lapidary, note
import tiny
from tiny import generate

PARTS = Path(os.environ.get("LAPIDARY_PARTS", "/tmp/lapidary-parts"))
PROMPT = [1, 20, 33, 47, 12, 7, 25, 90, 18, 64, 5]
FORMATS = ["int8", "int8,group=channel", "int8,asymmetric", "int4", "int4,asymmetric", "int4,keep=none", "fp8"]
OWN = ["llama-optimum", "qwen3-ort-genai", "gpt2-optimum"]
OF_OWN = ["bind", "bind-fp16", "embed", "embed-fp16", "strip-general", "strip-general-fp16", "bind-one-engine"]
OF_EXPORTS = ["bind", "embed", "strip-identical", "strip-general", "bind-fp16"]
# Where activations are rounded to codes, what fp16 rounds differently falls on another code now and then: compared in fp32.
ROUNDED = ["mo_fp8", "post_static", "post_quantized", "gpt2-many", "llama-many", "llama-products"]
MODES = tiny.MODES | {f"{mode}-fp32": [*tiny.MODES[mode], "--dtype", "fp32"] for mode in OF_EXPORTS[:4]}


def jobs():
    for export in OWN:
        for format in FORMATS:
            for mode in OF_OWN if export == OWN[0] else OF_OWN[:3]:
                yield f"{export} {format} {mode}", ROOT / "fixtures" / "exports" / export, mode, ["--quantize", format]
    for folder in sorted((PARTS / "quantized").glob("*/model.onnx")):
        rounded = any(folder.parent.name.startswith(name) for name in ROUNDED)
        for mode in [f"{mode}-fp32" for mode in OF_EXPORTS[:4]] if rounded else OF_EXPORTS:
            yield f"{folder.parent.name} {mode}", folder.parent, mode, []


def compare(package, prompt, limit):
    """Nine greedy tokens and their log-probabilities on the GPU and on the CPU."""
    return agreement(*(generate(package, prompt, 9, device) for device in ("cuda", "cpu")), limit)


def agreement(gpu, cpu, limit):
    """Whether two answers of `generate` are equal, up to the first token where the CPU's two best are closer than the limit."""
    worst, margin = 0.0, None
    for i, (ours, theirs) in enumerate(zip(gpu["steps"], cpu["steps"], strict=True)):
        listed = dict(map(tuple, theirs["top_logprobs"]))
        worst = max([worst] + [abs(p - listed[t]) for t, p in ours["top_logprobs"] if t in listed])
        if gpu["tokens"][i] != cpu["tokens"][i]:
            best = sorted((p for _, p in theirs["top_logprobs"]), reverse=True)
            margin = best[0] - best[1]
            break
    right = worst < limit and (margin is None or margin < limit)
    return {"ok": right, "worst_logprob": worst, **({} if margin is None else {"margin": margin})}


def check(name, folder, mode, flags):
    package = WORK / "quantized" / name.replace(" ", "-").replace(",", "-")
    chunks = [] if "--prefill" in MODES[mode] else ["--prefill", "4,16"]
    flags = ["--capacity", "16,32", *chunks, *MODES[mode], *flags, "--target", "tensorrt-rtx"]
    lapidary("convert", folder / "model.onnx", "-o", package, "--force", *flags)
    half = "fp32" not in mode and ("fp16" in mode or "f16" in name or "RtRtx" in name)
    limit = 0.05 if half else 2e-3
    result = compare(package, PROMPT, limit)
    engines = sum(path.stat().st_size for path in (package / "engines").glob("*"))
    shutil.rmtree(package)
    return result | {"engine_bytes": engines}


def all_of(jobs, check, what, only, seconds):
    """The results of `check(*job)` of the jobs whose names contain `only`, several at a time; the first of a job is its name."""
    results, end = {}, time.time() + seconds

    def one(job):
        if time.time() > end:
            return job[0], {"ok": False, "error": "the time was up before it began"}
        try:
            return job[0], check(*job)
        except Exception as error:  # noqa: BLE001 - each case is a result of its own
            return job[0], {"ok": False, "error": str(error)[-1200:]}

    with ThreadPoolExecutor(14) as pool:
        for name, result in pool.map(one, [job for job in jobs if only in job[0]]):
            results[name] = result
            if not result["ok"]:
                note("FAILED", name, json.dumps(result)[:900])
    good = sum(result["ok"] for result in results.values())
    note(f"{good} of {len(results)} {what} are right on the GPU")
    return {"ok": good == len(results), "right": good, "of": len(results), "cases": results}


def main(seconds=400):
    return all_of(jobs(), check, "quantized packages", os.environ.get("QUANTIZED", ""), seconds)


if __name__ == "__main__":
    raise SystemExit(0 if main()["ok"] else 1)
