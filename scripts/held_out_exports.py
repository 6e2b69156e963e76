#!/usr/bin/env python3
"""Make held-out exports, which were not used to write the passes: other sizes, other options, same families.

    EXPORTKIT_T5_PYTHON=t5/bin/python export/bin/python scripts/held_out_exports.py /work/heldout
    t5/bin/python scripts/held_out_exports.py /work/heldout          # those made with transformers 5

The two environments are those of make_fixtures.py; each run makes the exports that belong to its version of
transformers. Folders hold model.onnx and reference.json as in fixtures/exports; failures.json lists the models that an exporter
refused. `--only TEXT` makes just the folders whose name contains TEXT.
"""

import argparse
import json
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers
from exportkit import exporters
from exportkit.exporters import dynamo, dynamo_static, mobius_static, optimum, ort_genai, torchscript_static
from exportkit.families import Shape
from exportkit.making import export

SMALL = {"layers": 3, "heads": 6, "kv_heads": 2, "intermediate": 56}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

SHAPES = {
    "llama-hd32": Shape("llama", hidden=84, head_dim=32, vocabulary=131, **SMALL),
    "llama-hd128": Shape("llama", hidden=48, head_dim=128, vocabulary=83, tied=True, **SMALL),
    "llama-plain": Shape("llama", hidden=96, head_dim=16, vocabulary=101, **SMALL),
    "llama-bias": Shape("llama", hidden=42, head_dim=32, vocabulary=89, extra={"attention_bias": True, "mlp_bias": True}, **SMALL),
    "llama-rope3": Shape("llama", hidden=64, head_dim=32, vocabulary=103, extra={"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0}),
    "llama-mha": Shape("llama", hidden=48, head_dim=16, heads=3, kv_heads=3, layers=1, vocabulary=79),
    "llama-mqa": Shape("llama", hidden=64, head_dim=16, heads=4, kv_heads=1, layers=3, vocabulary=107, tied=True),
    "qwen2-hd32": Shape("qwen2", hidden=78, head_dim=32, vocabulary=151, **SMALL),
    "qwen2-hd128": Shape("qwen2", hidden=54, head_dim=128, vocabulary=91, tied=True, **SMALL),
    "qwen2-window": Shape(
        "qwen2", hidden=64, head_dim=32, vocabulary=109, layers=3,
        extra={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3-hd32": Shape("qwen3", hidden=72, head_dim=32, vocabulary=127, **SMALL),
    "qwen3-hd128": Shape("qwen3", hidden=48, head_dim=128, vocabulary=93, tied=True, **SMALL),
    "mistral-w5": Shape("mistral", hidden=84, head_dim=32, vocabulary=113, window=5, **SMALL),
    "mistral-w12": Shape("mistral", hidden=64, head_dim=16, vocabulary=99, window=12),
    "mistral-full": Shape("mistral", hidden=64, head_dim=32, heads=4, kv_heads=4, vocabulary=95, window=None),
    "gpt2-3": Shape("gpt2", hidden=96, layers=3, heads=6, intermediate=160, vocabulary=117),
    "gpt2-erf": Shape("gpt2", hidden=64, layers=2, heads=4, intermediate=None, vocabulary=85, extra={"activation_function": "gelu"}),
    "gpt2-tanh": Shape("gpt2", hidden=64, layers=3, heads=2, vocabulary=75, extra={"activation_function": "gelu_pytorch_tanh"}),
}  # fmt: skip

VARIANTS = exporters.EXPORTERS | {
    "optimum-opset14": partial(optimum, opset=14),
    "optimum-opset16": partial(optimum, opset=16),
    "dynamo-opset20": partial(dynamo, opset=20),
    "dynamo-opset21": partial(dynamo, opset=21, batch=False),
    "dynamo-opset24": partial(dynamo, opset=24),
    "dynamo-opset18-batch1": partial(dynamo, opset=18, batch=False),
    "dynamo-opset18-external": partial(dynamo, opset=18, external=True),
    "dynamo-opset18-fp16": partial(dynamo, opset=18, dtype=torch.float16),
    "dynamo-opset18-bf16": partial(dynamo, opset=18, dtype=torch.bfloat16),
    "dynamo-opset23-batch1": partial(dynamo, opset=23, batch=False),
    "dynamo-opset18-raw": partial(dynamo, opset=18, optimize=False),
    "dynamo-static-opset24": partial(dynamo_static, opset=24),
    "torchscript-static-opset14": partial(torchscript_static, opset=14),
    "torchscript-static-opset20": partial(torchscript_static, opset=20),
    "ort-genai-unfused": partial(ort_genai, options=("disable_qkv_fusion=true",)),
    "mobius-static-fp16": partial(mobius_static, dtype="f16"),
}

# Of every shape, exporters chosen so that each exporter meets each family and each oddity of size at least once.
MAKE = """
llama-hd32: optimum dynamo-opset18-batch1 dynamo-opset23 torchscript-static-opset14 ort-genai mobius-static
llama-hd128: optimum optimum-opset14 dynamo-opset24 dynamo-static mobius-static-fp16 dynamo-opset18-external
llama-plain: optimum-fp16 dynamo-opset18-bf16 dynamo-opset18-raw ort-genai-unfused torchscript-static-indexput
llama-bias: optimum dynamo-opset23-batch1 dynamo-static-opset24
llama-rope3: optimum dynamo-opset18 dynamo-opset23 ort-genai
llama-mha: optimum dynamo-opset23 mobius
llama-mqa: optimum dynamo-opset18 ort-genai dynamo-static-opset23
qwen2-hd32: optimum dynamo-opset20 dynamo-static mobius-static ort-genai
qwen2-hd128: optimum-fp16 dynamo-opset23 torchscript-static dynamo-dynamiccache
qwen2-window: optimum dynamo-opset18
qwen3-hd32: optimum dynamo-opset21 torchscript-static ort-genai dynamo-dynamiccache
qwen3-hd128: optimum-opset16 dynamo-opset23-fp16 dynamo-static-opset23 mobius
mistral-w5: optimum dynamo-opset18 dynamo-opset23 dynamo-dynamiccache torchscript-static-opset20
mistral-w12: optimum-fp16 dynamo-static dynamo-opset24
mistral-full: optimum dynamo-opset18 mobius-static ort-genai
gpt2-3: optimum dynamo-opset18 dynamo-opset23 torchscript-static dynamo-dynamiccache
gpt2-erf: optimum-opset14 dynamo-opset23 dynamo-static mobius
gpt2-tanh: optimum dynamo-opset18-fp16 dynamo-opset24 torchscript-static-indexput
"""
MAKE_WITH_TRANSFORMERS_5 = """
llama-hd32: dynamo-opset18 dynamo-opset23
qwen2-hd32: dynamo-opset18
qwen3-hd128: dynamo-opset23
mistral-w5: dynamo-opset18
gpt2-3: dynamo-opset18
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--only", default="", help="only folders whose name contains this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    newer = int(transformers.__version__.split(".")[0]) >= 5
    failures = {}
    for line in (MAKE_WITH_TRANSFORMERS_5 if newer else MAKE).strip().splitlines():
        shape, names = line.split(": ")
        for exporter in names.split():
            name = f"{shape}-{exporter}" + ("-t5" if newer else "")
            if arguments.only in name:
                export(name, SHAPES[shape], exporter, VARIANTS[exporter], arguments.target, failures)
    arguments.target.mkdir(parents=True, exist_ok=True)
    known = arguments.target / "failures.json"
    failures = (json.loads(known.read_text()) if known.exists() else {}) | failures
    failures = {name: why for name, why in failures.items() if not (arguments.target / name).exists()}
    known.write_text(json.dumps(failures, indent=1) + "\n")


if __name__ == "__main__":
    main()
