#!/usr/bin/env python3
"""One hash over a model's weights, the same for every system, file format and dtype that represents them exactly.

Each tensor of the Hugging Face checkpoint is narrowed to the first of f16, bf16 and f32 that holds all its numbers
exactly, so an fp16 checkpoint stored as fp32 has the same hash. Then BLAKE3 over the lines `name TAB dtype TAB dims TAB
hex(BLAKE3 of the little-endian bytes)` in order of name. A head that shares its numbers with the embedding is left out.
`lapidary bench` computes the same from a package.

    weights_hash.py MODEL.onnx|HUGGING_FACE_FOLDER      prints it, with the number of parameters, as JSON
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from schema import Unusable


def digest(data):
    try:
        from blake3 import blake3
    except ImportError as error:
        raise Unusable(f"{error}: the weights are hashed with BLAKE3; run\n    python3 -m pip install blake3") from error
    return blake3(data, max_threads=blake3.AUTO)


def narrowed(values):
    """`(dtype, bytes)` of a numpy array; a uint16 array holds bf16."""
    values = np.ascontiguousarray(values)
    if values.dtype == np.float16:
        if np.isnan(values).any():
            raise Unusable("a weight is not a number")
        return "f16", values
    wide = (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values.astype(np.float32)
    if np.isnan(wide).any():
        raise Unusable("a weight is not a number")
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    if np.array_equal(half.astype(np.float32), wide):
        return "f16", half
    bits = wide.view(np.uint32)
    if not (bits & 0xFFFF).any():
        return "bf16", (bits >> 16).astype(np.uint16)
    return "f32", wide


def line_of(name, dtype, shape, data):
    dims = ",".join(map(str, shape))
    return name, f"\t{dtype}\t{dims}\t{digest(memoryview(data.reshape(-1)).cast('B')).hexdigest()}\n"


def weights_hash(tensors):
    """`tensors`: pairs of checkpoint name and numpy array, one at a time in memory."""
    return joined(lines_of(tensors))


def lines_of(tensors):
    """A line for each, by name, a tied head left out."""
    return without_tied(line_of(name, dtype, data.shape, data) for name, (dtype, data) in
                        ((name, narrowed(values)) for name, values in tensors))  # fmt: skip


def without_tied(lines):
    lines = dict(lines)
    if lines.get("lm_head.weight") == lines.get("model.embed_tokens.weight"):
        lines.pop("lm_head.weight", None)
    return lines


def joined(lines):
    return digest("".join(name + lines[name] for name in sorted(lines)).encode()).hexdigest()


def elements(lines):
    """Numbers in all tensors, from the dims in their lines."""
    dims = (line.split("\t")[2] for line in lines.values())
    return sum(int(np.prod([int(n) for n in text.split(",") if n])) for text in dims)


def of_torch(model):
    """Of a transformers model; narrowing is done where its parameters lie."""
    import torch

    def lines():
        for name, parameter in model.named_parameters():
            dtype, values = narrowed_torch(parameter.detach(), torch)
            host = values.cpu().contiguous()
            yield line_of(name, dtype, host.shape, host.view(torch.int16 if dtype != "f32" else torch.int32).numpy())

    return joined(without_tied(lines()))


def narrowed_torch(values, torch):
    if torch.isnan(values).any():
        raise Unusable("a weight is not a number")
    if values.dtype == torch.float16:
        return "f16", values
    wide = values.float()
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        narrow = wide.to(dtype)
        if torch.equal(narrow.float(), wide):
            return name, narrow
    return "f32", wide


def of_file(path):
    """`{"hash", "parameters", "tied"}` of an export or a Hugging Face folder, found in a process of its own: hashing is
    not to count as the memory of a system."""
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unusable(done.stderr.strip().removeprefix("error: ")[-600:] or f"hashing {path} failed")
    return json.loads(done.stdout)


def of_onnx(path):
    """Lines of an export that keeps module paths: as names of weights, or as names of the nodes that multiply by them."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path, load_external_data=False)
    return lines_of(named_weights(model, path.parent, numpy_helper))


def of_hugging_face(folder):
    """Lines of the safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Unusable(f"{folder}: has no safetensors file")
    return lines_of(tensor for file in files for tensor in safetensors(file))


def safetensors(path):
    """Name and array of each tensor, mapped; bf16 as uint16. The format: github.com/huggingface/safetensors#format."""
    length = int.from_bytes(path.open("rb").read(8), "little")
    header = json.loads(np.memmap(path, np.uint8, "r", 8, (length,)).tobytes())
    dtypes = {"F16": "<f2", "F32": "<f4", "BF16": "<u2"}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        if facts["dtype"] not in dtypes:
            raise Unusable(f"{path}: {name} is {facts['dtype']}, and only F16, BF16 and F32 are hashed")
        begin, _ = facts["data_offsets"]
        yield name, np.memmap(path, dtypes[facts["dtype"]], "r", 8 + length + begin, tuple(facts["shape"]))


def named_weights(model, folder, numpy_helper):
    from onnx import external_data_helper

    uses = {}
    for node in model.graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    for initializer in model.graph.initializer:
        # Tables of angles and single numbers are not of the checkpoint.
        if not is_float(initializer) or not initializer.dims or initializer.name not in uses:
            continue
        name, turned = initializer.name, False
        if not name.endswith((".weight", ".bias")):
            node = uses[name][0]
            module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            if len(initializer.dims) != 2 or node.op_type != "MatMul" or not module.startswith(("model.", "lm_head")):
                if len(initializer.dims) == 2 and node.op_type == "MatMul":
                    raise Unusable(f"{folder}: neither its name nor its node's says which module {name} belongs to")
                continue
            name, turned = module + ".weight", True
        initializer = onnx_copy(initializer)
        if initializer.data_location == initializer.EXTERNAL:
            external_data_helper.load_external_data_for_tensor(initializer, str(folder))
        values = numpy_helper.to_array(initializer)
        yield name, values.T if turned else values


def is_float(initializer):
    return initializer.data_type in (initializer.FLOAT, initializer.FLOAT16)


def onnx_copy(initializer):
    """Loaded data must not stay in the model."""
    copy = type(initializer)()
    copy.CopyFrom(initializer)
    return copy


def main():
    try:
        path = Path(sys.argv[1])
        lines = of_hugging_face(path) if path.is_dir() else of_onnx(path)
        tied = "lm_head.weight" not in lines
        print(json.dumps({"hash": joined(lines), "parameters": elements(lines), "tied": tied}))
        return 0
    except (Unusable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
