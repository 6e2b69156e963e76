#!/usr/bin/env python3
"""Exports of many families on the GPU, with bound, embedded and stripped weights, in fp32 and fp16: against the CPU
executor on the same package, with a short prompt and with one that is longer than the windows and switches of tiny
models.

The exports are those that pack.sh took along from .gpu/families, one folder each. Tokens may differ where the CPU's two
best are closer than the limit.
"""

import json
import os
import shutil

from common import WORK, lapidary
from quantized import PARTS, agreement, all_of
from tiny import MODES, generate

SHORT = [1, 20, 33, 47, 12, 7, 25, 90, 18, 64, 5]
LONG = [(17 + 29 * i) % 94 + 3 for i in range(38)]
TOKENS = 9
SIGNIFICANT_BITS = {"fp32": 24, "fp16": 11, "bf16": 8}
OF_EXPORTS = ["bind", "embed", "strip-general", "bind-fp16"]


def jobs():
    for export in sorted((PARTS / "families").glob("*/model.onnx")):
        for mode in OF_EXPORTS:
            yield f"{export.parent.name} {mode}", export.parent, mode


def check(name, folder, mode):
    package = WORK / "families" / name.replace(" ", "-")
    flags = ["--capacity", "16,32,64", "--prefill", "4,16", *MODES[mode], "--target", "tensorrt-rtx"]
    lapidary("convert", folder / "model.onnx", "-o", package, "--force", *flags)
    answers = [[generate(package, prompt, TOKENS, device) for device in ("cuda", "cpu")] for prompt in (SHORT, LONG)]
    bits = SIGNIFICANT_BITS["fp16" if mode.endswith("fp16") else "bf16" if folder.name.endswith("bf16") else "fp32"]
    limit = 2e-3 if bits > 11 else half_limit(package, [cpu["tokens"] for _, cpu in answers], bits)
    results = [agreement(gpu, cpu, limit) for gpu, cpu in answers]
    shutil.rmtree(package)
    worst = max(result["worst_logprob"] for result in results)
    return {"ok": all(result["ok"] for result in results), "worst_logprob": worst, "limit": limit, "runs": results}


def half_limit(package, tokens, bits):
    """What log-probabilities of a dtype with these significant bits may differ by, from the largest logit of the CPU executor after each
    prompt and these tokens.

    fp16 has 11 significant bits, so it rounds a logit by up to 1/2048 of its size, and a log-probability moves as much even where all
    before it is exact. Random weights give logits of up to 90, whose rounding alone is 0.044. transformers' own fp16 is 1.0 to 11.7
    such roundings away from its fp32 (benches/results/fp16-rounding.json), its bf16 up to 13; fifteen are allowed here. A router that is
    tied within these roundings can choose other experts, which no limit covers: that file names such cases.
    """
    prompts = package.with_suffix(".prompts.json")
    workload = {"seed": 0, "timed": SHORT, "prompts": [SHORT, LONG], "forced": [row[:-1] for row in tokens]}
    prompts.write_text(json.dumps(workload))
    measured = lapidary("bench", package, "--device", "cpu", "--prompts", prompts, "--outputs", TOKENS, "--prefill", 1, "--warmup", 0,
                        "--repetitions", 1, "--copy-bandwidth", 1, "--json")
    prompts.unlink()
    largest = max(abs(logit) for row in json.loads(measured)["outputs"]["logits"] for _, logit in row["top"])
    return max(0.05, 15 * largest / 2**bits)


def main(seconds=430):
    return all_of(jobs(), check, "packages of other families", os.environ.get("FAMILIES", ""), seconds)


if __name__ == "__main__":
    raise SystemExit(0 if main()["ok"] else 1)
