#!/usr/bin/env python3
"""Exports of many families on the GPU, with bound, embedded and stripped weights, in fp32 and fp16: against the CPU
executor on the same package, with a short prompt and with one that is longer than the windows and switches of tiny
models.

The exports are those that pack.sh took along from .gpu/families, one folder each. Tokens may differ where the CPU's two
best are closer than the limit.
"""

import os
import shutil

from common import WORK, lapidary
from quantized import PARTS, all_of, compare
from tiny import MODES

SHORT = [1, 20, 33, 47, 12, 7, 25, 90, 18, 64, 5]
LONG = [(17 + 29 * i) % 94 + 3 for i in range(38)]
OF_EXPORTS = ["bind", "embed", "strip-general", "bind-fp16"]


def jobs():
    for export in sorted((PARTS / "families").glob("*/model.onnx")):
        for mode in OF_EXPORTS:
            yield f"{export.parent.name} {mode}", export.parent, mode


def check(name, folder, mode):
    package = WORK / "families" / name.replace(" ", "-")
    flags = ["--capacity", "16,32,64", "--prefill", "4,16", *MODES[mode], "--target", "tensorrt-rtx"]
    lapidary("convert", folder / "model.onnx", "-o", package, "--force", *flags)
    half = "fp16" in name
    results = [compare(package, prompt, 0.05 if half else 2e-3) for prompt in (SHORT, LONG)]
    shutil.rmtree(package)
    worst = max(result["worst_logprob"] for result in results)
    return {"ok": all(result["ok"] for result in results), "worst_logprob": worst, "runs": results}


def main(seconds=430):
    return all_of(jobs(), check, "packages of other families", os.environ.get("FAMILIES", ""), seconds)


if __name__ == "__main__":
    raise SystemExit(0 if main()["ok"] else 1)
