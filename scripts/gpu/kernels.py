#!/usr/bin/env python3
"""Decode kernels on the GPU: packages of every fixture in 16 bits, quantized ones among them, with kernels and without, against
the CPU executor on the same package. `LAPIDARY_KERNEL_TARGET=80` in the environment tries the variants for SM 8.0.

Tokens may differ where the CPU's two best are closer than the limit.
"""

import json
import os
import shutil

from common import ROOT, WORK, lapidary
from quantized import all_of, compare

# Ids that every fixture has.
SHORT = [3, 20, 33, 47, 12, 7, 25, 40, 18, 44, 5]
LONG = [(17 + 29 * i) % 44 + 3 for i in range(38)]
MODES = {
    "fp16": ["--dtype", "fp16"],
    "bf16": ["--dtype", "bf16"],
    "fp16-tensorrt": ["--dtype", "fp16", "--kernels", "off"],
}
# Of one exporter, in both types: groups and zero points that kernels have, by row and by block.
FORMATS = ["int8", "int8,group=channel", "int8,asymmetric", "int4", "int4,asymmetric", "int4,keep=none"]
QUANTIZED = ["llama-optimum", "qwen3-ort-genai", "mistral-optimum"]
GENERIC = os.environ.get("LAPIDARY_KERNEL_TARGET") == "80"


def jobs():
    folders = [path.parent for group in ("exports", "families", "experts") for path in sorted((ROOT / "fixtures" / group).glob("*/model.onnx"))]
    for folder in folders:
        # One exporter of a family is enough for the bits that differ by type and target only.
        for mode in MODES if not GENERIC else ["fp16", "bf16"]:
            yield f"{folder.name} {mode}", folder, MODES[mode], mode
    for name in QUANTIZED:
        for form in FORMATS:
            for mode in ("fp16", "bf16"):
                flags = [*MODES[mode], "--quantize", form]
                yield f"{name} {form} {mode}", ROOT / "fixtures" / "exports" / name, flags, mode


def check(name, folder, flags, mode):
    package = WORK / "kernels" / name.replace(" ", "-").replace(",", "-")
    flags = ["--capacity", "16,32,64", "--prefill", "4,16", *flags, "--target", "tensorrt-rtx"]
    lapidary("convert", folder / "model.onnx", "-o", package, "--force", *flags)
    engines = json.loads((package / "manifest.json").read_text())["engines"]
    plans = max(len(engine.get("plans") or []) for engine in engines)
    # bf16 keeps three bits less than fp16.
    limit = 0.3 if mode == "bf16" else 0.05
    results = [compare(package, prompt, limit) for prompt in (SHORT, LONG)]
    shutil.rmtree(package)
    worst = max(result["worst_logprob"] for result in results)
    return {"ok": all(result["ok"] for result in results), "worst_logprob": worst, "plans": plans, "runs": results}


def main(seconds=500):
    """KERNELS keeps the jobs whose names have one of its words, which `|` separates."""
    words = os.environ.get("KERNELS", "").split("|")
    wanted = [job for job in jobs() if any(word in job[0] for word in words)]
    what = "packages with decode kernels" + (" for SM 8.0" if GENERIC else "")
    return all_of(wanted, check, what, "", seconds)


if __name__ == "__main__":
    raise SystemExit(0 if main()["ok"] else 1)
