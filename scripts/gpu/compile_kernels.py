#!/usr/bin/env python3
"""Compiles the kernels of src/backend/tensorrt/run/device to PTX, which is committed: no user needs a CUDA compiler.

    pip install nvidia-cuda-nvrtc-cu12==12.4.127     # the PTX version decides which drivers take it: 12.4 and newer
    scripts/gpu/compile_kernels.py [--check]

Each `*.cu` there gives a `.ptx` beside it. The decode kernels in `decode/` come in variants, one for each form of weights and
size of work (VARIANTS below, and `variant.rs`, which chooses among them); those of one file of weights go together into
`decode/NAME.xz`: for each variant a line `@ VARIANT BYTES`, then that many bytes of PTX. `decode/sources.json` has the SHA-256 of
every source, by which a test knows that the archives are theirs.

--check compiles and compares with what is committed.
"""

import argparse
import ctypes
import hashlib
import json
import lzma
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "src/backend/tensorrt/run/device"
DECODE = FOLDER / "decode"
# Turing, the oldest that TensorRT-RTX runs on.
OLDEST = 75

# The decode kernels: everything from SM 8.0 on, and with clusters and dependent launch SM 9.0.
TARGETS = {80: {"DEPENDENT": 0}, 90: {"DEPENDENT": 1}}
DTYPES = {"f16": 0, "bf16": 1}
HEAD_SIZES = [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256]
# (warps, 8-row tiles, stages) of products, by weights and groups: those that sweeps on an H200 chose (benches/kernels).
SHAPES = {
    "floats": [(16, 2, 6), (8, 4, 6), (8, 2, 3), (8, 2, 12), (16, 2, 2), (4, 4, 3)],
    "i8": [(8, 4, 3), (16, 2, 3), (8, 2, 6)],
    "i4 long": [(8, 4, 2), (8, 4, 6), (8, 2, 6), (8, 4, 3)],
    "i4 short": [(8, 4, 2), (8, 2, 3), (8, 4, 6), (8, 2, 6), (4, 4, 2)],
}
# The same of several rows: by warps, x in shared memory as a whole or streamed with the weights, (8-row tiles, stages), the
# preferred one first: those that fit the GPU's shared memory. For floats by sweeps of 8 B fp16; `variant.rs` has the same lists.
ROWS = [8, 16]
SHAPES_OF_ROWS = {
    "floats": {16: [[(2, 6), (2, 3), (2, 2)], [(4, 3), (2, 2)]], 8: [[(4, 8), (2, 8), (2, 3)], [(2, 6), (2, 3)]], 4: [[(4, 3)], [(4, 3)]]},
    "i8": {16: [[(2, 3)], [(2, 3)]], 8: [[(4, 3)], [(4, 3)]]},
    "i4 long": {8: [[(4, 2)], [(4, 2)]]},
    "i4 short": {8: [[(4, 2)], [(4, 2)]], 4: [[(4, 2)], [(4, 2)]]},
}
GROUPS = {"i8": [32, 64, 128], "i4 long": [64, 128], "i4 short": [16, 32]}


def variants():
    """(archive, variant, source, macros)"""
    for dtype, bf16 in DTYPES.items():
        for target, macros in TARGETS.items():
            macros = dict(macros, BF16=bf16, ARCH=target)
            for size in HEAD_SIZES:
                # The variants for SM 8.0 must fit 99 KiB of shared memory. Stages change no result.
                stages = 1 if size > 128 or size > 80 and target == 80 else 2
                shape = dict(HEAD_DIM=size, WARPS=4 if size > 128 else 8, STAGES=stages, SPLITS=8, MANY=0)
                shape["CLUSTER"] = int(target == 90)
                name = f"attention-{dtype}-d{size}-sm{target}"
                yield f"attention-{dtype}", name, "attention.cu", dict(macros, **shape)
                # Of several sequences, which need fewer blocks each. Without clusters small GPUs have no memory for that.
                shape |= dict(MANY=1, STAGES=1) if target == 90 else {}
                name = f"attention-{dtype}-d{size}-rows-sm{target}"
                yield f"attention-{dtype}", name, "attention.cu", dict(macros, TABLES=1, **shape)
            forms = [("floats", "floats", "", dict(FORMAT=16)), ("i8", "i8", "-rows", dict(FORMAT=8, SIGNED=1, GROUP=0))]
            for kind, groups in GROUPS.items():
                weights = kind.split()[0]
                for group in groups:
                    for zeros in (0, 1):
                        layout = f"-g{group}{'z' if zeros else ''}"
                        form = dict(FORMAT=int(weights[1:]), SIGNED=1, GROUP=group, ZEROS=zeros)
                        forms.append((kind, weights, layout, form))
            for kind, weights, layout, form in forms:
                for warps, tiles, stages in SHAPES[kind]:
                    shape = dict(WARPS=warps, TILES=tiles, STAGES=stages, ROWS=1, RESIDENT=2, STREAM=0)
                    name = f"product-{dtype}-{weights}{layout}-w{warps}t{tiles}s{stages}-sm{target}"
                    yield f"product-{dtype}-{weights}", name, "product.cu", dict(macros, **form, **shape)
                of_rows = [(warps, stream, *shape) for warps, lists in SHAPES_OF_ROWS[kind].items()
                           for stream in (0, 1) for shape in lists[stream]]
                for rows, (warps, stream, tiles, stages) in ((rows, shape) for rows in ROWS for shape in of_rows):
                    shape = dict(WARPS=warps, TILES=tiles, STAGES=stages, ROWS=rows, RESIDENT=1 if warps == 16 else 2, STREAM=stream)
                    name = f"product-{dtype}-{weights}{layout}-r{rows}{'x' if stream else ''}-w{warps}t{tiles}s{stages}-sm{target}"
                    yield f"product-{dtype}-{weights}", name, "product.cu", dict(macros, **form, **shape)


def nvrtc():
    try:
        import nvidia.cuda_nvrtc as package
        folders = [Path(path) / "lib" for path in package.__path__]
    except ImportError:
        folders = []
    for folder in folders:
        for file in folder.glob("libnvrtc.so.*"):
            return ctypes.CDLL(str(file))
    return ctypes.CDLL("libnvrtc.so.12")


def compile_to_ptx(path, target=OLDEST, macros=None):
    library = nvrtc()

    def check(code, what):
        if code != 0:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            sys.exit(f"{path}: {what} failed with {code}\n{log.value.decode()}")

    program = ctypes.c_void_p()
    check(library.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None), "create")
    options = [f"--gpu-architecture=compute_{target}", "--std=c++17", f"-I{path.parent}"]
    options += [f"-D{name}={value}" for name, value in (macros or {}).items()]
    options = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    check(library.nvrtcCompileProgram(program, len(options), options), "compile")
    size = ctypes.c_size_t()
    check(library.nvrtcGetPTXSize(program, ctypes.byref(size)), "size")
    text = ctypes.create_string_buffer(size.value)
    check(library.nvrtcGetPTX(program, text), "ptx")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return text.value.decode()


def compile_variant(variant):
    _, name, source, macros = variant
    macros = dict(macros)
    target = macros.pop("ARCH")
    return name, compile_to_ptx(DECODE / source, target, macros)


def archives():
    """The contents of every archive, by its name."""
    found = list(variants())
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        texts = dict(pool.map(compile_variant, found, chunksize=8))
    contents = {}
    for archive, name, _, _ in found:
        contents.setdefault(archive, []).append(name)
    # Targets of one shape beside each other: they differ in a few lines.
    return {archive: "".join(f"@ {name} {len(texts[name])}\n{texts[name]}" for name in sorted(names)).encode()
            for archive, names in contents.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    files = {source.with_suffix(".ptx"): compile_to_ptx(source).encode() for source in sorted(FOLDER.glob("*.cu"))}
    files |= {DECODE / f"{name}.xz": content for name, content in archives().items()}
    sources = sorted(path for path in DECODE.iterdir() if path.suffix in (".cu", ".cuh"))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    files[DECODE / "sources.json"] = (json.dumps(hashes, indent=1) + "\n").encode()
    stale = []
    for path, content in files.items():
        packed = path.suffix == ".xz"
        if not arguments.check:
            path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME) if packed else content)
            continue
        committed = path.read_bytes() if path.exists() else b""
        if (lzma.decompress(committed) if packed and committed else committed) != content:
            stale.append(path.name)
    unknown = {path.name for path in DECODE.glob("*.xz")} - {path.name for path in files}
    if arguments.check and (stale or unknown):
        sys.exit(f"not what the sources compile to: {', '.join(stale + sorted(unknown))}")
    for name in unknown:
        (DECODE / name).unlink()


if __name__ == "__main__":
    main()
