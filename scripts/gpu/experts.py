#!/usr/bin/env python3
"""Both forms of `lowering.experts` at real sizes: decoders of one or two MoE layers with random weights, each converted twice,
compared with the CPU executor and measured.

The packages differ in decode engines, which have one row. Of prefill only the layers before the last say something about several
rows, and those are the same in both packages: after the last attention engines compute the last token alone.

    python3 experts.py SIZE FOLDER [LAYERS]          # only makes the export; needs no GPU, and torch if it is large
"""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from onnx import TensorProto, helper

from common import WORK, lapidary
from export_forms import GenAi
from make_model import Export
from quantized import compare

try:
    import torch
except ImportError:
    torch = None

# Those of Qwen3-30B-A3B, gpt-oss-20b and Mixtral-8x7B, but for the vocabulary; `small` is for trying this without a GPU.
SIZES = {
    "qwen3": dict(layers=2, hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, top_k=8, intermediate=768, vocabulary=32000),
    "gptoss": dict(layers=1, hidden=2880, heads=64, kv_heads=8, head_dim=64, experts=32, top_k=4, intermediate=2880, vocabulary=32000),
    "mixtral": dict(layers=1, hidden=4096, heads=32, kv_heads=8, head_dim=128, experts=8, top_k=2, intermediate=14336, vocabulary=32000),
    "small": dict(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, experts=8, top_k=2, intermediate=48, vocabulary=300),
}
FORMS = ["chosen", "all"]
PROMPT = list(range(1, 10))
HALF = TensorProto.FLOAT16


def export(size, folder, layers=None):
    """A decoder in the form of onnxruntime-genai's builder, fp16, whose layers are attention and com.microsoft's MoE."""
    s = SimpleNamespace(**SIZES[size])
    out = Export(folder, HALF)
    generator = np.random.default_rng(0)
    device = "cuda" if torch and torch.cuda.is_available() else "cpu"
    if torch:
        torch.manual_seed(0)

    def random(*shape, scale):
        if torch:
            return torch.empty(shape, dtype=torch.float16, device=device).normal_(0, scale)
        return (generator.standard_normal(shape, np.float32) * scale).astype(np.float16)

    def linear(name, x, rows, columns):
        return out.linear(name, x, random(rows, columns, scale=1.2 * columns**-0.5))

    def norm(name, x):
        return form.norm(name, x, out.weight(name + ".weight", np.ones(s.hidden, np.float16)))

    def matrices(name, rows, columns):
        return out.weight(name, random(s.experts, rows, columns, scale=1.2 * columns**-0.5))

    attention = SimpleNamespace(num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim)
    form = GenAi(out, attention, 1e6, 4096, np.float16)
    x = out.node("Gather", [out.weight("embed", random(s.vocabulary, s.hidden, scale=1.0)), "input_ids"], ["embedded"], axis=0)
    out.small("flat", np.array([-1, s.experts], np.int64))
    past, present = [], []
    for i in range(layers or s.layers):
        p = f"model.layers.{i}."
        ins, outs = ([f"{kind}.{i}.{part}" for part in ("key", "value")] for kind in ("past_key_values", "present"))
        h = norm(p + "input_layernorm", x)
        heads = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
        q, k, v = (linear(p + f"self_attn.{n}_proj", h, count * s.head_dim, s.hidden) for n, count in heads.items())
        a = form.attention(p + "attention", q, k, v, ins, outs)
        x = out.node("Add", [x, linear(p + "self_attn.o_proj", a, s.hidden, s.heads * s.head_dim)], [p + "attended"])
        h = norm(p + "post_attention_layernorm", x)
        router = out.node("Reshape", [linear(p + "mlp.gate", h, s.experts, s.hidden), "flat"], [p + "router"])
        gate = matrices(p + "mlp.fc1", s.intermediate, s.hidden)
        down = matrices(p + "mlp.fc2", s.hidden, s.intermediate)
        up = matrices(p + "mlp.fc3", s.intermediate, s.hidden)
        moe = out.node("MoE", [h, router, gate, "", down, "", up], [p + "moe"], domain="com.microsoft", activation_type="silu",
                       k=s.top_k, normalize_routing_weights=1)  # fmt: skip
        x = out.node("Add", [x, moe], [p + "output"])
        past += [(name, ["batch_size", s.kv_heads, "past_sequence_length", s.head_dim]) for name in ins]
        present += [(name, ["batch_size", s.kv_heads, "total_sequence_length", s.head_dim]) for name in outs]
    out.linear("lm_head", norm("model.norm", x), random(s.vocabulary, s.hidden, scale=2 * s.hidden**-0.5))
    out.nodes[-1].output[0] = "logits"
    out.data.close()

    def values(items, element=HALF):
        return [helper.make_tensor_value_info(name, element, shape) for name, shape in items]

    ids = [("input_ids", ["batch_size", "sequence_length"]), ("attention_mask", ["batch_size", "total_sequence_length"])]
    logits = [("logits", ["batch_size", "sequence_length", s.vocabulary])]
    graph = helper.make_graph(out.nodes, "moe", values(ids, TensorProto.INT64) + values(past), values(logits) + values(present),
                              initializer=out.initializers)  # fmt: skip
    opsets = [helper.make_opsetid(domain, version) for domain, version in form.opsets.items()]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")


def packages(size, folder):
    """The export and a package of each form; nothing but the form of one row differs."""
    export(size, folder / "export")
    spec = folder / "chosen.yaml"
    # Layers of TensorRT alone, since they are what is compared.
    convert(folder, "chosen", "--target", "tensorrt-rtx", "--capacity", 1024, "--prefill", 128, "--kernels", "off", "--save-spec", spec)
    chosen, other = "\n  experts: chosen\n", "\n  experts: all\n"
    if chosen not in spec.read_text():
        raise RuntimeError(f"{spec} does not say `experts: chosen`")
    (folder / "all.yaml").write_text(spec.read_text().replace(chosen, other))
    convert(folder, "all", "--spec", folder / "all.yaml")
    shutil.rmtree(folder / "export")


def convert(folder, form, *flags):
    lapidary("convert", folder / "export" / "model.onnx", "-o", folder / form, "--force", *flags)


def measure(package, form, file):
    lapidary("bench", package, "--device", "cuda", "--prefill", "16,128", "--repetitions", 10, "--decode", 300, "--decode-samples", 64,
             "--outputs", 16, "--profile", "--model-name", f"moe-{package.parent.name}", "--label", form, "-o", file)  # fmt: skip
    return condensed(json.loads(file.read_text()))


def condensed(result):
    """Of a result of `lapidary bench`: times of a token and of a prompt, and those of the layers of experts in a decode step.

    Layers are timed one by one, without a CUDA graph, and are means over the layers of the model. Where gate and up run side by
    side, the time of one is also in that of the other.
    """
    decode, profile = result["decode"][0], result["profile"]["decode"]
    parts = {"gather": "GathGathGath", "gate": "gate_product", "up": "up_product", "down": "down_product"}
    each = {part: sum(ms for name, ms in profile["layers"] if word in name) / result["model"]["layers"] for part, word in parts.items()}
    return {
        "decode_ms": decode["ms"]["median"],
        "decode_gpu_ms": decode["gpu_ms"],
        "stable": decode["stable"],
        "profiled_decode_ms": profile["total_ms"],
        "profiled_ms_a_layer": each,
        "prefill_ms": {str(prefill["tokens"]): prefill["ms"]["median"] for prefill in result["prefill"]},
        "scratch_bytes": result["memory"]["device"]["scratch"],
    }


def main(sizes=("qwen3", "gptoss", "mixtral")):
    sizes = [size for size in sizes if os.environ.get("EXPERTS", "") in size]
    folder = WORK / "experts"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda size: packages(size, folder / size), sizes))
    models = {}
    for size in sizes:  # alone, since they are timed
        forms = {}
        for form in FORMS:
            package = folder / size / form
            timed = measure(package, form, folder / f"{size}-{form}.json")
            forms[form] = {"against_cpu": compare(package, PROMPT, 0.05), **timed}
            shutil.rmtree(package)
        models[size] = {"dims": SIZES[size], "forms": forms}
    right = all(form["against_cpu"]["ok"] for model in models.values() for form in model["forms"].values())
    return {"ok": right, "models": models}


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in SIZES:
        raise SystemExit(__doc__)
    export(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
