#!/usr/bin/env python3
"""Write the answers of ONNX Runtime with basic optimizations on quantized exports: the reference of tests/cli/exports.rs.

Beyond basic optimizations ONNX Runtime computes int4 QDQ, and MatMulNBits of accuracy level 4, with activations rounded to
8 bits, which the files do not say. So `reference.json` beside the exports, made with all optimizations, is another answer for
some of them. Per export this writes greedy tokens and the best log-probabilities of each step, how they were computed, and how
far they are from `reference.json`.

    python scripts/quantized_references.py ../shared/exports/quantized tests/cli/quantized_references.json

How (`by`):

- `basic`: the file as it is, ORT_ENABLE_BASIC. Accuracy levels of MatMulNBits are set to 1 (fp32) unless the weights are fp16.
- `fp32`: the same, with every fp16 of the file made fp32. FP8 with fp16 arithmetic rounds so that two levels of ONNX Runtime
  differ by 0.3 to 0.6; in fp32 they agree.
- `dequantized`: DequantizeLinear of constants computed here by its definition and put in as fp32, for types that ONNX Runtime
  has no kernel for (NVFP4).

Needs onnx, onnxruntime, numpy, ml_dtypes. Exit status: 0 written, 2 an export is missing or cannot be computed.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from exportkit import cached
from onnx import TensorProto, numpy_helper

TOKENS = 9
BEST = 8


def attribute(node, name, default):
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def in_fp32(model):
    """Every fp16 of a graph becomes fp32."""
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in model.graph.node:
        for a in node.attribute:
            if node.op_type == "Cast" and a.name == "to" and a.i == half:
                a.i = single
            if a.type == onnx.AttributeProto.TENSOR and a.t.data_type == half:
                a.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(a.t).astype(np.float32)))
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    del model.graph.value_info[:]


def dequantized(model):
    """Every DequantizeLinear of constants becomes a constant: (code - zero point) * scale, a scale for each block."""
    constants = {t.name: t for t in model.graph.initializer}
    values = {name: numpy_helper.to_array(t) for name, t in constants.items()}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    left = []
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or not all(i in values for i in node.input if i):
            left.append(node)
            continue
        codes, scale = (values[i].astype(np.float32) for i in node.input[:2])
        axis, size = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        zero = values[node.input[2]].astype(np.float32) if len(node.input) > 2 and node.input[2] else np.zeros_like(scale)

        def spread(part):
            if size:
                return np.repeat(part, size, axis=axis).take(range(codes.shape[axis]), axis=axis)
            if part.ndim == 1 and part.size > 1:
                return part.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])
            return part

        values[node.output[0]] = made = (codes - spread(zero)) * spread(scale)
        tensor = numpy_helper.from_array(made.astype(np.float32), node.output[0])
        constants[tensor.name] = tensor
    read = {i for node in left for i in node.input}
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(left)
    model.graph.initializer.extend(t for name, t in constants.items() if name in read)
    del model.graph.value_info[:]


def in_fp32_products(model):
    """MatMulNBits over fp32 computes in fp32, and not with activations of 8 bits (accuracy level 4)."""
    for node in model.graph.node:
        for a in node.attribute:
            if node.op_type in ("MatMulNBits", "GatherBlockQuantized") and a.name == "accuracy_level" and a.i == 4:
                a.i = 1


def head_dim(model):
    """Elements of a head, for caches whose file leaves that open: GroupQueryAttention's cosines have half as many."""
    shapes = {t.name: t.dims for t in model.graph.initializer}
    tables = [n.input[7] for n in model.graph.node if n.op_type == "GroupQueryAttention" and len(n.input) > 7]
    return 2 * shapes[tables[0]][1] if tables and tables[0] in shapes else None


class Runner:
    """A session with caches that go round."""

    def __init__(self, model, folder, level):
        self.head_dim = head_dim(model)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = level
        # Beside its data file, so that relative paths hold.
        path = folder / "model.onnx"
        onnx.save(model, path)
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def greedy(self, prompt):
        """Greedy tokens, with the log-probabilities of each step."""
        tokens, rows = cached.greedy(self.session, prompt, TOKENS, self.head_dim)
        return tokens, [log_softmax(row) for row in rows]


def log_softmax(row):
    row = row - row.max()
    return row - np.log(np.exp(row).sum())


def case_of(prompt, tokens, rows):
    def best(row):
        return [[int(i), round(float(row[i]), 5)] for i in np.argsort(-row, kind="stable")[:BEST]]

    return {"prompt": prompt, "tokens": tokens, "top": [best(row) for row in rows]}


def apart(rows, tokens, case):
    """From another reference: the largest difference of its best log-probabilities up to the first step that was given another
    token, and that step."""
    worst, step = 0.0, None
    for i, (row, best) in enumerate(zip(rows, case["top"])):
        worst = max([worst, *(abs(float(row[t]) - p) for t, p in best)])
        if tokens[i] != case["tokens"][i]:
            step = i
            break
    return worst, step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quantized_references"))
    args = parser.parse_args()
    given = json.loads((args.exports / "reference.json").read_text())
    args.scratch.mkdir(parents=True, exist_ok=True)
    levels = ort.GraphOptimizationLevel
    prompts = [case["prompt"] for case in next(iter(given.values()))]
    found = {}
    for path in sorted(args.exports.glob("*/model.onnx")):
        name = path.parent.name
        model = onnx.load(path)
        by = "basic"
        if "nvfp4" in name:
            by = "dequantized"
            dequantized(model)
        elif "fp8" in name:
            by = "fp32"
            in_fp32(model)
        in_fp32_products(model)
        try:
            runner = Runner(model, args.scratch, levels.ORT_ENABLE_BASIC)
        except Exception as error:  # noqa: BLE001
            print(f"error: {name}: {error}", file=sys.stderr)
            return 2
        cases, distance, differs = [], 0.0, None
        for i, prompt in enumerate(prompts):
            tokens, rows = runner.greedy(prompt)
            cases.append(case_of(prompt, tokens, rows))
            if name in given:
                worst, step = apart(rows, tokens, given[name][i])
                distance = max(distance, worst)
                if step is not None:
                    differs = [i, step] if differs is None else differs
        found[name] = {"by": by, "cases": cases}
        if name in given:
            found[name]["from_given"] = {"log_probabilities": float(f"{distance:.1e}"), "first_other_token": differs}
        print(f"{name}: {by}, {distance:.1e} from reference.json, first other token {differs}", flush=True)
    lines = [f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in found.items()]
    args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
