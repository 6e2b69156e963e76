#!/usr/bin/env python3
"""Make fixtures/quantized: static QDQ exports as ONNX Runtime's extended optimizations save them, and weights in opset 25's types.

Small exports of fixtures/exports are quantized with `quantize_static` (activations and weights of 8 bits), and a session with
extended optimizations writes what it makes of them (`optimized_model_filepath`): `QLinear..` operators and `QGemm`, and codes that
are moved between `QuantizeLinear` and `DequantizeLinear`. `reference.json` is what ONNX Runtime with basic optimizations answers on
the quantizer's file, in the form of fixtures/exports; both files mean the same. Names are made short. Deterministic.

`llama-mxfp8`, `-mxfp4`, `-int2` have the weights of their linear layers as DequantizeLinear of opset 25 over float8e4m3fn and
float4e2m1 codes in blocks of 32 with float8e8m0 scales (where those divide the inputs), and uint2 codes in blocks of 16 with
zero points. ONNX Runtime has no kernels for them: their reference has these weights computed here, by the definition, in fp32.

    python scripts/make_quantized_fixtures.py fixtures/exports fixtures/quantized [--only NAME] [--held-out FOLDER]

`--held-out` writes other models and settings there, with their references, for a comparison that no test repeats.
"""

import argparse
import collections
import json
import logging
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from exportkit import cached
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

PROMPT = [1, 20, 33, 47, 90, 7, 25, 61, 80, 64, 5]
STEPS = 9
LEVELS = ort.GraphOptimizationLevel
# What a compiler's quantizer usually takes, and everything that the quantizer knows.
PRODUCTS = ["MatMul", "Gemm"]
MANY = ["MatMul", "Gemm", "Add", "Mul", "Softmax", "Sigmoid", "Transpose", "Reshape", "Concat", "Slice", "Gather", "Split"]
NAMED = {
    "llama-products": ("llama-optimum", PRODUCTS, {}, "ext"),
    "llama-many": ("llama-optimum", MANY, {}, "ext"),
    "gpt2-many": ("gpt2-optimum", MANY, {"per_channel": True}, "ext"),
}


def session(path, level=LEVELS.ORT_ENABLE_BASIC, saved=None):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    if saved:
        options.optimized_model_filepath = str(saved)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answer(run):
    """Greedy tokens, with the logits of each step."""
    return cached.greedy(run, PROMPT, STEPS)


class Texts(CalibrationDataReader):
    """Random tokens, behind caches that the model itself made."""

    def __init__(self, path):
        run = session(path)
        ports = run.get_inputs()
        rng, all_feeds = np.random.default_rng(0), []
        for _ in range(4):
            caches, seen = cached.empty(ports), 0
            for count in (7, 4):
                tokens = rng.integers(1, 96, count).tolist()
                # The quantizer's own calibration takes no empty caches.
                if seen:
                    all_feeds.append(cached.feeds(ports, tokens, seen, caches))
                _, caches = cached.step(run, tokens, seen, caches)
                seen += count
        self.feeds = iter(all_feeds)

    def get_next(self):
        return next(self.feeds, None)


def without_range(path):
    """Nodes of which an operand or result is infinite, NaN or a mask's lowest number: they have no range of codes."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    have = {o.name for o in model.graph.output}
    floats = {v.name for v in model.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    made = [o for n in model.graph.node for o in n.output if o in floats and o not in have]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in made)
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS.ORT_DISABLE_ALL
    options.log_severity_level = 4
    run = ort.InferenceSession(model.SerializeToString(), options)
    names, bad = [o.name for o in run.get_outputs()], set()
    for given in Texts(path).feeds:
        for name, value in zip(names, run.run(None, given)):
            if value.dtype == np.float32 and value.size and not np.abs(value).max() < 1e30:
                bad.add(name)
    return [n.name for n in model.graph.node if bad & {*n.input, *n.output}]


def shorten(model):
    """Short names of values and nodes other than inputs and outputs, and nothing that is not needed."""
    kept = {v.name for v in [*model.graph.input, *model.graph.output]}
    names = {"": ""}

    def short(name):
        if name in kept:
            return name
        return names.setdefault(name, f"v{len(names)}")

    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
        node.doc_string = ""
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = short(tensor.name)
    del model.graph.value_info[:], model.metadata_props[:]
    used = {n.domain for n in model.graph.node}
    opsets = [o for o in model.opset_import if o.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)


def scaled(matrix, form):
    """Codes, scales, zero points, and the matrix `[in, out]` that they mean."""
    size = 16 if form == "int2" else 32
    depth, columns = matrix.shape
    blocks = matrix.astype(np.float32).reshape(-1, size, columns)
    if form == "int2":
        low, high = blocks.min(1), blocks.max(1)
        scales = ((high - low) / 3).astype(np.float32)
        zeros = np.clip(np.rint(-low / scales), 0, 3).astype(np.float32)
        codes = np.clip(np.rint(blocks / scales[:, None]) + zeros[:, None], 0, 3)
        meant = (codes - zeros[:, None]) * scales[:, None]
        return codes.reshape(depth, columns), scales, zeros, meant.reshape(depth, columns)
    kind = {"mxfp8": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float4_e2m1fn}[form]
    # The power of two of the block's largest number, less that of the codes' largest.
    largest = {"mxfp8": 8, "mxfp4": 2}[form]
    exponent = np.floor(np.log2(np.abs(blocks).max(1))) - largest
    scales = np.exp2(exponent).astype(np.float32)
    most = float(ml_dtypes.finfo(kind).max)
    codes = np.clip(blocks / scales[:, None], -most, most).astype(kind)
    meant = codes.astype(np.float32) * scales[:, None]
    return codes.reshape(depth, columns), scales, None, meant.reshape(depth, columns)


def packed(codes, bits):
    flat = codes.reshape(-1).astype(np.uint8)
    each = 8 // bits
    flat = np.concatenate([flat, np.zeros(-len(flat) % each, np.uint8)]).reshape(-1, each)
    return sum(flat[:, i] << (i * bits) for i in range(each)).astype(np.uint8).tobytes()


def make_weights(source, out, form):
    out.mkdir(parents=True, exist_ok=True)
    model, plain = onnx.load(source), onnx.load(source)
    meant = {t.name: t for t in plain.graph.initializer}
    kinds = onnx.TensorProto
    size = 16 if form == "int2" else 32
    shapes = {t.name: t.dims for t in model.graph.initializer}
    linear = {n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in shapes}
    linear = {name for name in linear if shapes[name][0] % size == 0}
    tensors, nodes = [], []
    for tensor in model.graph.initializer:
        if tensor.name not in linear:
            tensors.append(tensor)
            continue
        codes, scales, zeros, values = scaled(onnx.numpy_helper.to_array(tensor), form)
        code, scale, zero = (f"{tensor.name}.{part}" for part in ("codes", "scales", "zeros"))
        attributes = {"axis": 0, "block_size": size}
        if form == "int2":
            raw = [(code, kinds.UINT2, codes.shape, packed(codes, 2)), (zero, kinds.UINT2, zeros.shape, packed(zeros, 2))]
            raw.append((scale, kinds.FLOAT, scales.shape, scales.tobytes()))
        else:
            bits, kind = (8, kinds.FLOAT8E4M3FN) if form == "mxfp8" else (4, kinds.FLOAT4E2M1)
            powers = (np.log2(scales) + 127).astype(np.uint8)
            raw = [(code, kind, codes.shape, packed(codes.view(np.uint8), bits))]
            raw.append((scale, kinds.FLOAT8E8M0, scales.shape, powers.tobytes()))
            attributes["output_dtype"] = kinds.FLOAT
        for name, kind, dims, data in raw:
            tensors.append(onnx.TensorProto(name=name, data_type=kind, dims=dims, raw_data=data))
        inputs = [code, scale] + ([zero] if zeros is not None else [])
        nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [tensor.name], **attributes))
        meant[tensor.name].CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
    rest = list(model.graph.node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(tensors)
    model.graph.node.extend([*nodes, *rest])
    for opset in model.opset_import:
        opset.version = 25 if opset.domain in ("", "ai.onnx") else opset.version
    model.ir_version = 13
    shorten(model)
    onnx.save(model, out / "model.onnx")
    onnx.save(plain, out / "plain.onnx")
    tokens, rows = answer(session(out / "plain.onnx"))
    (out / "plain.onnx").unlink()
    write_reference(out, tokens, rows)
    print(f"{out.name}: {(out / 'model.onnx').stat().st_size >> 10} KiB; from the floats {apart(rows[:1], answer(session(source))[1][:1]):.2g}")


def write_reference(out, tokens, rows):
    reference = {
        "prompt": PROMPT,
        "greedy_tokens": tokens,
        "prefill_last_logits": [float(f"{v:.7g}") for v in rows[0]],
        "step_logits": [[float(f"{v:.7g}") for v in row] for row in rows[1:]],
    }
    (out / "reference.json").write_text(json.dumps(reference, separators=(",", ":")) + "\n")


def apart(a, b):
    def normal(row):
        row = row - row.max()
        return row - np.log(np.exp(row).sum())

    return max(float(np.abs(normal(x) - normal(y)).max()) for x, y in zip(a, b))


def make(source, out, types, options, level):
    out.mkdir(parents=True, exist_ok=True)
    qdq, saved = out / "qdq.onnx", out / "model.onnx"
    reader = Texts(source)
    settings = {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        **options,
    }
    quantize_static(
        str(source),
        str(qdq),
        reader,
        op_types_to_quantize=types,
        nodes_to_exclude=without_range(source),
        **settings,
    )
    wanted = {"ext": LEVELS.ORT_ENABLE_EXTENDED, "all": LEVELS.ORT_ENABLE_ALL, "basic": LEVELS.ORT_ENABLE_BASIC}[level]
    session(qdq, wanted, saved)
    model = onnx.load(saved)
    shorten(model)
    onnx.save(model, saved)
    tokens, rows = answer(session(qdq))
    others = [answer(session(saved, LEVELS.ORT_DISABLE_ALL)), answer(session(source))]
    qdq.unlink()
    write_reference(out, tokens, rows)
    counts = collections.Counter(n.op_type for n in model.graph.node if n.domain or "Q" in n.op_type or "Deq" in n.op_type)
    same = next((i for i, (a, b) in enumerate(zip(tokens, others[0][0])) if a != b), len(tokens))
    print(
        f"{out.name}: {saved.stat().st_size >> 10} KiB, {dict(counts)}; saved file by ONNX Runtime: "
        f"{apart(rows[:same + 1], others[0][1][:same + 1]):.1e} apart for {same + 1} steps; from the floats {apart(rows[:1], others[1][1][:1]):.2g}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--held-out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.held_out:
        for family in ("llama", "qwen2", "qwen3", "gpt2", "mistral"):
            for exporter in ("optimum", "dynamo-opset18"):
                source = args.exports / f"{family}-{exporter}" / "model.onnx"
                for name, types, options, level in (
                    ("products-i8", PRODUCTS, {"activation_type": QuantType.QInt8}, "ext"),
                    ("all-level", MANY, {"per_channel": True}, "all"),
                    ("every", None, {}, "ext"),
                    ("qoperator", MANY, {"quant_format": QuantFormat.QOperator}, "ext"),
                    ("symmetric", MANY, {"activation_type": QuantType.QInt8, "extra_options": {"ActivationSymmetric": True}}, "ext"),
                ):
                    try:
                        make(source, args.held_out / f"{family}-{exporter}-{name}", types, options, level)
                    except Exception as error:  # noqa: BLE001
                        print(f"{family}-{exporter}-{name}: {str(error)[:200]}")
        return 0
    for name, (source, types, options, level) in NAMED.items():
        if args.only in (None, name):
            make(args.exports / source / "model.onnx", args.out / name, types, options, level)
    for form in ("mxfp8", "mxfp4", "int2"):
        if args.only in (None, f"llama-{form}"):
            make_weights(args.exports / "llama-optimum" / "model.onnx", args.out / f"llama-{form}", form)
    return 0


if __name__ == "__main__":
    sys.exit(main())
