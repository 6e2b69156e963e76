#!/usr/bin/env python3
"""Write fixtures/bad/: ONNX files that must be refused with exit status 2 and one clear message.

Nearly all are good.onnx, a one-layer decoder that ONNX Runtime runs, with one defect, so that
only the defect can be found. Deterministic. Needs onnx and numpy:

    python scripts/bad_models.py fixtures/bad
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 13, 16, 4, 2, 8, 32

CASES = {}


def case(text):
    """Register a function `(folder) -> None` that writes the files of one case, with a description of the defect."""

    def register(function):
        CASES[function.__name__.replace("_", "-")] = (function, text)
        return function

    return register


def decoder():
    """A one-layer decoder with a growing cache: RMSNormalization, RotaryEmbedding, Attention of opset 24."""
    random = np.random.default_rng(0)

    def weight(name, *shape):
        return numpy_helper.from_array(random.normal(0, 0.4, shape).astype(np.float32), name)

    angles = np.arange(POSITIONS)[:, None] * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    initializers = [
        weight("embed", VOCABULARY, HIDDEN),
        weight("norm", HIDDEN),
        weight("q_proj", HIDDEN, HEADS * HEAD_DIM),
        weight("k_proj", HIDDEN, KV_HEADS * HEAD_DIM),
        weight("v_proj", HIDDEN, KV_HEADS * HEAD_DIM),
        weight("o_proj", HEADS * HEAD_DIM, HIDDEN),
        weight("final_norm", HIDDEN),
        weight("lm_head", HIDDEN, VOCABULARY),
        numpy_helper.from_array(np.cos(angles).astype(np.float32), "cos"),
        numpy_helper.from_array(np.sin(angles).astype(np.float32), "sin"),
    ]

    def node(op, name, inputs, outputs, **attributes):
        return helper.make_node(op, inputs, outputs, name=name, **attributes)

    nodes = [
        node("Gather", "embed_tokens", ["embed", "input_ids"], ["x"]),
        node("RMSNormalization", "input_norm", ["x", "norm"], ["h"], axis=-1, epsilon=1e-5),
        node("MatMul", "q", ["h", "q_proj"], ["q"]),
        node("MatMul", "k", ["h", "k_proj"], ["k"]),
        node("MatMul", "v", ["h", "v_proj"], ["v"]),
        node("RotaryEmbedding", "q_rope", ["q", "cos", "sin", "position_ids"], ["q_turned"], num_heads=HEADS),
        node("RotaryEmbedding", "k_rope", ["k", "cos", "sin", "position_ids"], ["k_turned"], num_heads=KV_HEADS),
        node(
            "Attention",
            "attention",
            ["q_turned", "k_turned", "v", "", "past_key_values.0.key", "past_key_values.0.value"],
            ["a", "present.0.key", "present.0.value"],
            is_causal=1,
            q_num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        ),
        node("MatMul", "o", ["a", "o_proj"], ["ao"]),
        node("Add", "residual", ["x", "ao"], ["y"]),
        node("RMSNormalization", "output_norm", ["y", "final_norm"], ["z"], axis=-1, epsilon=1e-5),
        node("MatMul", "head", ["z", "lm_head"], ["logits"]),
    ]

    def value(name, shape, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    past, present = ["batch", KV_HEADS, "past", HEAD_DIM], ["batch", KV_HEADS, "total", HEAD_DIM]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [
            value("input_ids", ["batch", "tokens"], TensorProto.INT64),
            value("position_ids", ["batch", "tokens"], TensorProto.INT64),
            value("past_key_values.0.key", past),
            value("past_key_values.0.value", past),
        ],
        [
            value("logits", ["batch", "tokens", VOCABULARY]),
            value("present.0.key", present),
            value("present.0.value", present),
        ],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11, producer_name="bad_models.py")


def save(model, folder, name="model.onnx"):
    (folder / name).write_bytes(model.SerializeToString())


def node_of(model, name):
    return next(node for node in model.graph.node if node.name == name)


def tensor_of(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def insert_before(model, name, *nodes):
    position = [node.name for node in model.graph.node].index(name)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(position + offset, node)


def reroute(model, name, old, new):
    node = node_of(model, name)
    node.input[list(node.input).index(old)] = new


# --- not ONNX, or not all of it ------------------------------------------------------------------------------


@case("the first three fifths of a model: the protobuf ends inside a field")
def truncated(folder):
    content = decoder().SerializeToString()
    (folder / "model.onnx").write_bytes(content[: len(content) * 3 // 5])


@case("an English sentence")
def text(folder):
    (folder / "model.onnx").write_text("This is a text file and not an ONNX model, whatever its name says.\n")


@case("a file of no bytes, which is a valid empty protobuf")
def empty(folder):
    (folder / "model.onnx").write_bytes(b"")


@case("a ZIP header, as torch.save writes")
def zip_archive(folder):
    (folder / "model.onnx").write_bytes(b"PK\x03\x04\x14\x00\x00\x00\x00\x00" + b"archive/data.pkl" + b"\0" * 64)


@case("a model without a graph")
def no_graph(folder):
    model = decoder()
    model.ClearField("graph")
    save(model, folder)


# --- external data -------------------------------------------------------------------------------------------


def externalize(folder, location="model.onnx.data", keep=None, length=None, offset=0, name="embed"):
    """The decoder with one weight outside; `keep` bytes of it are written, None writes all, 0 no file."""
    model = decoder()
    tensor = tensor_of(model, name)
    content = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": offset, "length": len(content) if length is None else length}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    if keep != 0:
        (folder / "model.onnx.data").write_bytes(content[:keep])
    save(model, folder)


@case("weight `embed` is in model.onnx.data, which is missing")
def external_missing(folder):
    externalize(folder, keep=0)


@case("model.onnx.data ends 100 bytes into weight `embed`")
def external_short(folder):
    externalize(folder, keep=100)


@case("weight `embed` starts behind the end of model.onnx.data")
def external_offset(folder):
    externalize(folder, offset=1 << 40)


@case("offset of weight `embed` is not a number")
def external_offset_text(folder):
    externalize(folder, offset="twelve")


@case("length of weight `embed` is 8 bytes, its shape wants 832")
def external_length(folder):
    externalize(folder, length=8)


@case("weight `embed` points to `../good.onnx`, out of the model's folder")
def external_parent(folder):
    externalize(folder, location="../good.onnx", keep=0)


@case("weight `embed` points to `sub/../../good.onnx`, out of the model's folder by a detour")
def external_detour(folder):
    externalize(folder, location="sub/../../good.onnx", keep=0)


@case("weight `embed` points to `/etc/passwd`")
def external_absolute(folder):
    externalize(folder, location="/etc/passwd", keep=0)


# --- weights -------------------------------------------------------------------------------------------------


@case("weight `lm_head` has 40 bytes less than its shape wants")
def weight_short(folder):
    model = decoder()
    tensor = tensor_of(model, "lm_head")
    tensor.raw_data = tensor.raw_data[:-40]
    save(model, folder)


@case("weight `lm_head` says it is [2^40, 2^40]: the size overflows 64 bits")
def weight_overflow(folder):
    model = decoder()
    tensor_of(model, "lm_head").dims[:] = [1 << 40, 1 << 40]
    save(model, folder)


@case("weight `lm_head` has a negative dim")
def weight_negative(folder):
    model = decoder()
    tensor_of(model, "lm_head").dims[:] = [-16, -13]
    save(model, folder)


@case("weight `lm_head` is complex64")
def weight_complex(folder):
    model = decoder()
    tensor_of(model, "lm_head").CopyFrom(numpy_helper.from_array(np.zeros((HIDDEN, VOCABULARY), np.complex64), "lm_head"))
    save(model, folder)


@case("node `o` multiplies by `o_proj`, which is not defined")
def missing_initializer(folder):
    model = decoder()
    model.graph.initializer.remove(tensor_of(model, "o_proj"))
    save(model, folder)


# --- the graph -----------------------------------------------------------------------------------------------


@case("three nodes (`fancy`, `words`, `twirl`) with ops that do not exist or are not supported; all named at once")
def unknown_ops(folder):
    model = decoder()
    insert_before(
        model,
        "residual",
        helper.make_node("FancyGate", ["ao"], ["ao1"], name="fancy", domain="com.example"),
        helper.make_node("WordConvEmbedding", ["ao1", "o_proj", "q_proj"], ["ao2"], name="words", domain="com.microsoft"),
        helper.make_node("Twirl", ["ao2"], ["ao3"], name="twirl"),
    )
    reroute(model, "residual", "ao", "ao3")
    model.opset_import.extend([helper.make_opsetid("com.example", 1), helper.make_opsetid("com.microsoft", 1)])
    save(model, folder)


@case("node `residual` adds float16 to float32")
def wrong_dtype(folder):
    model = decoder()
    insert_before(model, "residual", helper.make_node("Cast", ["ao"], ["ao16"], name="to_half", to=TensorProto.FLOAT16))
    reroute(model, "residual", "ao", "ao16")
    save(model, folder)


@case("node `o` multiplies `[…, 32]` by `[16, 16]`")
def wrong_shape(folder):
    model = decoder()
    tensor = tensor_of(model, "o_proj")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((16, 16), np.float32), "o_proj"))
    save(model, folder)


@case("nodes `residual` and `loop` need one another's results")
def cycle(folder):
    model = decoder()
    insert_before(model, "residual", helper.make_node("Add", ["ao", "y"], ["ao1"], name="loop"))
    reroute(model, "residual", "ao", "ao1")
    save(model, folder)


@case("nodes `k` and `v` both define the value `k`")
def duplicate_value(folder):
    model = decoder()
    node_of(model, "v").output[0] = "k"
    reroute(model, "attention", "v", "k")
    save(model, folder)


@case("two graph inputs are named `input_ids`")
def duplicate_input(folder):
    model = decoder()
    model.graph.input[1].name = "input_ids"
    save(model, folder)


@case("graph output `logits` is made by no node")
def missing_output(folder):
    model = decoder()
    node_of(model, "head").output[0] = "scores"
    save(model, folder)


@case("node `choose` is an If whose condition depends on the number of tokens")
def control_flow_if(folder):
    model = decoder()

    def branch(name, op):
        node = helper.make_node(op, ["ao"], [name])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    model.graph.initializer.append(numpy_helper.from_array(np.array([4]), "four"))
    insert_before(model, "residual", helper.make_node("Shape", ["input_ids"], ["count"], name="count", start=1, end=2))
    insert_before(model, "residual", helper.make_node("Greater", ["count", "four"], ["condition"], name="many"))
    node = helper.make_node(
        "If", ["condition"], ["chosen"], name="choose", then_branch=branch("then", "Identity"), else_branch=branch("else", "Neg")
    )
    insert_before(model, "residual", node)
    reroute(model, "residual", "ao", "chosen")
    save(model, folder)


@case("node `repeat` is a Loop")
def control_flow_loop(folder):
    model = decoder()
    scalar = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))]
    state = helper.make_tensor_value_info("s", TensorProto.FLOAT, None)
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Neg", ["s"], ["s2"])],
        "body",
        [*scalar, state],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("s2", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(2), "trips"))
    insert_before(model, "residual", helper.make_node("Loop", ["trips", "", "ao"], ["looped"], name="repeat", body=body))
    reroute(model, "residual", "ao", "looped")
    save(model, folder)


@case("opset 9; 11 to 24 are read")
def opset_old(folder):
    model = decoder()
    model.opset_import[0].version = 9
    save(model, folder)


@case("opset 99; 11 to 24 are read")
def opset_new(folder):
    model = decoder()
    model.opset_import[0].version = 99
    save(model, folder)


# --- no decoder, or not a whole one --------------------------------------------------------------------------


@case("input `past_key_values.0.value` has no output: nothing gives `present.0.value`")
def unpaired_cache(folder):
    model = decoder()
    del model.graph.output[2]
    del node_of(model, "attention").output[2]
    save(model, folder)


@case("no cache at all: past inputs and present outputs are gone")
def no_cache(folder):
    model = decoder()
    del model.graph.output[1:]
    del model.graph.input[2:]
    node = node_of(model, "attention")
    del node.input[3:]
    del node.output[1:]
    save(model, folder)


@case("a network of two fully connected layers on `[batch, 4]` floats: no language model")
def not_a_language_model(folder):
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="second"),
    ]
    shapes = {"w1": (4, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
    weights = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])]
    graph = helper.make_graph(nodes, "mlp", inputs, outputs, weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder)


README = """# Files that must be refused

Made by `scripts/bad_models.py`. `good.onnx` is a one-layer decoder (opset 24, concat cache) that converts and runs; nearly every other case is the same model with one defect, so that it is the defect that is found.

| folder | what is wrong with its model.onnx |
|---|---|
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.target, ignore_errors=True)
    arguments.target.mkdir(parents=True)
    good = decoder()
    onnx.checker.check_model(good, full_check=True)
    save(good, arguments.target, "good.onnx")
    rows = []
    for name, (write, text) in CASES.items():
        folder = arguments.target / name
        folder.mkdir()
        write(folder)
        rows.append(f"| {name} | {text} |")
    (arguments.target / "README.md").write_text(README + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
