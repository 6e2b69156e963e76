#!/usr/bin/env python3
"""Make fixtures/exports/: tiny models of five families, exported by every exporter that takes them.

Each folder FAMILY-EXPORTER holds model.onnx (with model.onnx.data where the exporter writes one) and
reference.json: eleven prompt ids, nine greedy tokens, the logits of the last prompt position and of eight greedy
steps. Deterministic: the same versions give the same files. Needed only to add a fixture; needs two Python
environments (the ORT-GenAI and mobius builders want transformers 5, optimum wants 4.57):

    python -m venv export && export/bin/pip install torch==2.15.0 transformers==4.57.6 optimum-onnx==0.1.0 \\
        onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 accelerate
    python -m venv t5 && t5/bin/pip install torch==2.15.0 transformers==5.23.0 onnxruntime-genai==0.18.0 \\
        mobius-onnx==0.1.0 onnx-shape-inference onnxscript onnx==1.23.2
    EXPORTKIT_T5_PYTHON=t5/bin/python export/bin/python scripts/make_fixtures.py fixtures/exports

`--only TEXT` makes just the folders whose name contains TEXT. README.md of the folder is rewritten from its contents.
"""

import argparse
import json
import warnings
from pathlib import Path

from exportkit import exporters
from exportkit.families import Shape
from exportkit.making import export

# ONNX Runtime's GroupQueryAttention wants a head_dim that is a multiple of 16. A window of 8 is shorter than the 11 tokens of the prompt, so a graph that ignores it gives other tokens.
SHAPES = {
    "llama": Shape("llama", head_dim=16),
    "qwen2": Shape("qwen2", head_dim=16, tied=True),
    "qwen3": Shape("qwen3", head_dim=16),
    "mistral": Shape("mistral", head_dim=16, window=8),
    "gpt2": Shape("gpt2"),
}
# The dialects below differ from their neighbors by dtype or by how the cache is written: one family is enough.
ONE_FAMILY = {
    "dynamo-opset23-fp16": "llama",
    "dynamo-static-opset23": "llama",
    "torchscript-static-indexput": "qwen2",
    "ort-genai-fp16": "llama",
}


README = """# Tiny models, exported

Made by `scripts/make_fixtures.py` (deterministic), which says how. Every folder of a family holds the same random weights: {dims}. Llama: untied, Qwen2: tied, with q/k/v biases, Qwen3: norms on q and k, Mistral: sliding window of 8 (shorter than the prompt), GPT-2: learned positions, head_dim 8, all heads are KV heads, tied. Static caches hold 32 positions.

Versions: torch 2.15.0, transformers 4.57.6 (optimum and torch) and 5.23.0 (ORT-GenAI, mobius), optimum-onnx 0.1.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, onnxruntime-genai 0.18.0, mobius-onnx 0.1.0.

`reference.json`: `prompt` (11 ids), `greedy_tokens` (9), `prefill_last_logits`, `step_logits` (the 8 further steps), all of them what ONNX Runtime computes from that very file, fp16 files in fp16; `torch_max_difference` compares with the model in torch without a cache (null: other tokens); fp16 files also have `torch_prefill_last_logits` and `torch_step_logits`, the same fp16 weights in fp32 arithmetic; `cache.pairs` names past inputs and their outputs.

- `mistral-ort-genai`, `mistral-mobius` and `mistral-mobius-static` **ignore the window**: those exporters drop it, so the graphs compute plain causal attention and their reference is that.
- The dynamo graphs lack two kinds of metadata that the exporter writes on each node (`pkg.torch.onnx.stack_trace` and `.fx_node`), half of so small a file. Everything else is as the exporters wrote it.
- `torchscript-static-indexput` writes the cache by `index_put` (ScatterND with three-column indices), the other by `index_copy` (ScatterElements). `dynamo-static` is ScatterND.
- `ort-genai-fp16` runs in ONNX Runtime's CPU provider only with its graph optimizations off.

"""


def write_table(target, failures):
    known = target / "failures.json"
    failures = (json.loads(known.read_text()) if known.exists() else {}) | failures
    failures = {name: text for name, text in sorted(failures.items()) if not (target / name).exists()}
    known.write_text(json.dumps(failures, indent=1) + "\n")
    rows = []
    for path in sorted(target.glob("*/reference.json")):
        facts = json.loads(path.read_text())
        size = sum(file.stat().st_size for file in path.parent.glob("model.onnx*")) // 1024
        difference = facts["torch_max_difference"]
        agrees = "other tokens" if difference is None else f"{difference:.1e}"
        rows.append(
            f"| {path.parent.name} | {facts['opset']} | {facts['dtype']} | {facts['cache']['kind']} "
            f"| {facts['engine'].split('+')[0]} | {agrees} | {size} KiB |"
        )
    header = README.format(dims="vocabulary 97, hidden 32, 2 layers, 4 query heads over 2 KV heads, head_dim 16, 64 positions")
    table = "| folder | opset | dtype | cache | reference | largest difference to torch | model |\n|---|---|---|---|---|---|---|\n"
    text = header + table + "\n".join(rows) + "\n\n## What failed\n\n"
    text += "\n".join(f"- `{name}`: {why}" for name, why in failures.items()) + "\n"
    (target / "README.md").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--only", default="", help="only folders whose name contains this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    failures = {}
    for family, shape in SHAPES.items():
        for exporter in exporters.EXPORTERS:
            name = f"{family}-{exporter}"
            if arguments.only in name and ONE_FAMILY.get(exporter, family) == family:
                export(name, shape, exporter, exporters.EXPORTERS[exporter], arguments.target, failures)
    write_table(arguments.target, failures)


if __name__ == "__main__":
    main()
