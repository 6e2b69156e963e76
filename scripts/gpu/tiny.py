#!/usr/bin/env python3
"""Every small export of fixtures/exports on the GPU, with weights bound, embedded and stripped.

Greedy tokens must be those of the recorded reference, log-probabilities near those of Lapidary's CPU executor; the cache
moves twice on the way. Capacities and chunks are tiny so that padding, moves and chunk after chunk all happen.
"""

import argparse
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import ROOT, WORK, lab, lapidary, note

MODES = {
    "bind": ["--weights", "bind"],
    "embed": ["--weights", "embed"],
    "strip-identical": ["--weights", "strip", "--refit", "identical"],
    "strip-general": ["--weights", "strip", "--refit", "general"],
    "embed-general": ["--weights", "embed", "--refit", "general"],
    "bind-dynamic": ["--weights", "bind", "--prefill", "1:4:8"],
    "bind-one-engine": ["--weights", "bind", "--prefill", "1:4:8", "--one-engine"],
    "bind-fp16": ["--weights", "bind", "--dtype", "fp16"],
    "embed-fp16": ["--weights", "embed", "--dtype", "fp16"],
    "strip-general-fp16": ["--weights", "strip", "--refit", "general", "--dtype", "fp16"],
}


def generate(package, prompt, n, device):
    """`n` greedy tokens; the prompt is a list of ids, or a file with rows of embeddings."""
    given = ["--prompt-embeds", prompt] if isinstance(prompt, Path) else ["--prompt-ids", ",".join(map(str, prompt))]
    out = lapidary("generate", package, *given, "--temperature", 0, "--max-new-tokens", n, "--ignore-eos",
                   "--json", "--logprobs", 8, "--device", device)
    return json.loads(out)


def check(name, mode):
    folder = ROOT / "fixtures" / "exports" / name
    reference = json.loads((folder / "reference.json").read_text())
    package = WORK / "tiny" / f"{name}-{mode}"
    chunks = [] if "--prefill" in MODES[mode] else ["--prefill", "4,8"]
    flags = ["--capacity", "12,16,24", *chunks, *MODES[mode], "--target", "tensorrt-rtx"]
    lapidary("convert", folder / "model.onnx", "-o", package, "--force", *flags)
    prompt, n = reference["prompt"], len(reference["greedy_tokens"])
    gpu, cpu = (generate(package, prompt, n, device) for device in ("cuda", "cpu"))
    worst = 0.0
    for ours, theirs in zip(gpu["steps"], cpu["steps"]):
        theirs = dict(map(tuple, theirs["top_logprobs"]))
        worst = max([worst] + [abs(p - theirs[t]) for t, p in ours["top_logprobs"] if t in theirs])
    half = "fp16" in name or "fp16" in mode
    right = gpu["tokens"] == (cpu["tokens"] if half else reference["greedy_tokens"]) and worst < (0.05 if half else 2e-3)
    if mode == "bind" and right:
        # Sequence after sequence in one device: caches come and go, scratch memory grows under engines that ran.
        listed, rows = WORK / "tiny" / f"{name}.json", WORK / "tiny" / f"{name}.f32"
        listed.write_text(json.dumps([{"prompt": prompt[:k], "forced": prompt[k:]} for k in (1, 3, 11, 2)]))
        lab("logits", package, "--cases", listed, "--output", rows)
        values = np.fromfile(rows, np.float32)
        rows = values.reshape(-1, reference["model"]["vocabulary"])
        # The last row of each case is after the same 11 tokens.
        ends = rows[[10, 19, 20, 30]]
        right = bool(np.abs(ends - ends[0]).max() < (0.05 if half else 2e-2))
    shutil.rmtree(package)
    return {"ok": right, "worst_logprob": worst, "engine": gpu["engine"], "load_ms": gpu["timing"]["load_ms"],
            **({} if right else {"tokens": gpu["tokens"], "expected": reference["greedy_tokens"]})}


def main(families=("llama",), modes=tuple(MODES), only_first=0, seconds=170):
    """Every export with bound weights, and of each family one in every other mode."""
    exports = sorted(path.parent.name for path in (ROOT / "fixtures" / "exports").glob("*/model.onnx"))
    exports = [name for name in exports if name.split("-")[0] in families]
    firsts = [next(n for n in exports if n.startswith(f"{family}-") and n.endswith("optimum")) for family in families]
    jobs = []
    for mode in modes:
        names = exports if mode == "bind" else firsts
        jobs += [(name, mode) for name in (names[:only_first] if only_first else names)]
    results, end = {}, time.time() + seconds

    def one(job):
        if time.time() > end:
            return job, {"ok": False, "error": "the time was up before it began"}
        try:
            return job, check(*job)
        except Exception as error:  # noqa: BLE001 - each case is a result of its own
            return job, {"ok": False, "error": str(error)[-1200:]}

    with ThreadPoolExecutor(14) as pool:
        for (name, mode), result in pool.map(one, jobs):
            results[f"{name} {mode}"] = result
            if not result["ok"]:
                note("FAILED", name, mode, json.dumps(result)[:900])
    good = sum(result["ok"] for result in results.values())
    note(f"{good} of {len(results)} small exports are right on the GPU")
    return {"ok": good == len(results), "right": good, "of": len(results), "cases": results}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", default="llama,gpt2,mistral,qwen2,qwen3")
    arguments = parser.parse_args()
    raise SystemExit(0 if main(tuple(arguments.families.split(",")))["ok"] else 1)
