#!/usr/bin/env python3
"""Find the codes at which ONNX Runtime's operators on codes (QLinearAdd, QGemm ..) do not give the nearest code, and what they change.

The operators are defined as: dequantize, compute, quantize to the nearest code. ONNX Runtime folds the scales into one factor per
operand in fp32, so a value that lies within a few millionths of the middle between two codes may get the farther one. For each operator
this script computes the exact value (in f64) from ONNX Runtime's own operands, and lists the codes that are not the nearest with
their distance from the middle. Then it runs the definition, written out as DequantizeLinear, the operator on floats and QuantizeLinear,
twice: as it is, and with every code that lies so close to the middle set as ONNX Runtime has it. If the second run equals ONNX Runtime,
these codes are the whole difference.

    python scripts/quantized_ties.py FOLDER...      # each with model.onnx, as scripts/make_quantized_fixtures.py --held-out writes it

Exit status: 0 nothing but such codes differs, 1 something else does.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from make_quantized_fixtures import LEVELS, PROMPT, STEPS, apart, empty, feeds
from onnx import helper

KINDS = ("QLinearAdd", "QLinearMul", "QLinearMatMul", "QGemm", "QLinearConcat")
# Of a code, from the middle between two: what fp32 with folded scales may take for the other side.
CLOSE = 2e-5


def operands(node):
    """Triples of code, scale, zero point that an operator reads, and scale and zero point of its result."""
    names = list(node.input)
    if node.op_type == "QLinearConcat":
        return [names[i : i + 3] for i in range(2, len(names), 3)], names[:2]
    return [names[0:3], names[3:6]], names[7:9] if node.op_type == "QGemm" else names[6:8]


def exact(node, values):
    """The result of an operator in codes, before it is rounded, in f64."""
    wide = lambda name: values[name].astype(np.float64)
    triples, (scale, zero) = operands(node)
    floats = [(wide(code) - wide(z)) * wide(s) for code, s, z in triples]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "QLinearConcat":
        result = np.concatenate(floats, axis=attributes["axis"])
    elif node.op_type == "QGemm":
        a, b = (x.T if attributes.get(flag) else x for x, flag in zip(floats, ("transA", "transB")))
        result = a @ b
        if node.input[6]:
            result = result + wide(node.input[6]) * wide(node.input[1]) * wide(node.input[4])
        result = result * attributes.get("alpha", 1.0)
    else:
        result = {"QLinearAdd": np.add, "QLinearMul": np.multiply, "QLinearMatMul": np.matmul}[node.op_type](*floats)
    limits = np.iinfo(values[zero].dtype)
    return np.clip(result / wide(scale) + wide(zero), limits.min, limits.max)


def written_out(model):
    """The same model with each operator as its definition, after which codes can be set: inputs NAME.set and NAME.to."""
    made, out = [], onnx.ModelProto()
    out.CopyFrom(model)

    def add(kind, inputs, output, **attributes):
        made.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    for node in model.graph.node:
        if node.op_type not in KINDS:
            made.append(node)
            continue
        name = node.output[0]
        triples, result = operands(node)
        floats = [add("DequantizeLinear", triple, f"{name}.{i}") for i, triple in enumerate(triples)]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "QGemm":
            if node.input[6]:
                scale = add("Mul", [node.input[1], node.input[4]], f"{name}.scale")
                wide = add("Cast", [node.input[6]], f"{name}.wide", to=onnx.TensorProto.FLOAT)
                floats.append(add("Mul", [wide, scale], f"{name}.bias"))
            attributes["beta"] = attributes.get("alpha", 1.0)
        kind = {"QGemm": "Gemm"}.get(node.op_type, node.op_type.removeprefix("QLinear"))
        real = add(kind, floats, f"{name}.real", **attributes)
        nearest = add("QuantizeLinear", [real, *result], f"{name}.nearest")
        add("Where", [f"{name}.set", f"{name}.to", nearest], name)
        zero = next(t for t in model.graph.initializer if t.name == result[1])
        for suffix, dtype in (("set", onnx.TensorProto.BOOL), ("to", zero.data_type)):
            out.graph.input.append(helper.make_tensor_value_info(f"{name}.{suffix}", dtype, None))
    del out.graph.node[:]
    out.graph.node.extend(made)
    return out


def session(model, more=()):
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    have = {o.name for o in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more if name not in have)
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compare(folder):
    model = onnx.load(folder / "model.onnx")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in KINDS]
    read = [name for n in nodes for name in n.input if name and name not in constants]
    theirs = session(model, dict.fromkeys([*read, *(n.output[0] for n in nodes)]))
    definition = session(written_out(model))
    ports, outputs = theirs.get_inputs(), [o.name for o in definition.get_outputs()]
    caches = [empty(ports)] * 3
    seen, feed, fine, worst = 0, list(PROMPT), True, [0.0, 0.0]
    for step in range(STEPS):
        values = dict(zip([o.name for o in theirs.get_outputs()], theirs.run(None, feeds(ports, feed, seen, caches[0]))))
        known = {**constants, **feeds(ports, feed, seen, caches[0]), **values}
        nothing, set_codes = {}, {}
        for node in nodes:
            name, codes = node.output[0], values[node.output[0]]
            value = exact(node, known)
            middles = value - np.floor(value) - 0.5
            undecided = np.abs(middles) < CLOSE
            for at in map(tuple, np.argwhere(np.rint(value) != codes)):
                middle = middles[at]
                fine &= bool(undecided[at])
                print(f"{folder.name}, step {step}: {node.op_type} {name}{[int(i) for i in at]} is {codes[at]}; exactly {value[at]:.7f}, {middle:+.1e} from the middle")
            nothing |= {f"{name}.set": np.zeros_like(undecided), f"{name}.to": codes}
            set_codes |= {f"{name}.set": undecided, f"{name}.to": codes}
        logits = [values["logits"]]
        for i, changes in enumerate((nothing, set_codes), 1):
            found = dict(zip(outputs, definition.run(None, feeds(ports, feed, seen, caches[i]) | changes)))
            logits.append(found["logits"])
            caches[i] = {name: found[name.replace("past_key_values", "present")] for name in caches[i]}
        caches[0] = {name: values[name.replace("past_key_values", "present")] for name in caches[0]}
        rows = [row[0, -1].astype(np.float64) for row in logits]
        worst = [max(w, apart(rows[:1], [row])) for w, row in zip(worst, rows[1:])]
        seen += len(feed)
        feed = [int(np.argmax(rows[0]))]
    print(f"{folder.name}: ONNX Runtime is {worst[0]:.2g} from the definition, {worst[1]:.2g} once these codes are as it has them")
    return fine and worst[1] < 1e-4


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(0 if all([compare(Path(folder)) for folder in sys.argv[1:]]) else 1)
