#!/usr/bin/env python3
"""Compiles src/backend/tensorrt/run/device/*.cu to PTX beside them, which is committed: nobody else needs a CUDA compiler.

    pip install nvidia-cuda-nvrtc-cu12==12.4.127     # the PTX version decides which drivers take it: 12.4 and newer
    scripts/gpu/compile_kernels.py [--check]

--check compiles and compares with what is committed.
"""

import argparse
import ctypes
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "src/backend/tensorrt/run/device"
# Turing, the oldest that TensorRT-RTX runs on.
OPTIONS = [b"--gpu-architecture=compute_75", b"--std=c++17"]


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


def compile_to_ptx(library, path):
    def check(code, what):
        if code != 0:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            sys.exit(f"{path}: {what} failed with {code}\n{log.value.decode()}")

    program = ctypes.c_void_p()
    check(library.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None), "create")
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    check(library.nvrtcCompileProgram(program, len(OPTIONS), options), "compile")
    size = ctypes.c_size_t()
    check(library.nvrtcGetPTXSize(program, ctypes.byref(size)), "size")
    text = ctypes.create_string_buffer(size.value)
    check(library.nvrtcGetPTX(program, text), "ptx")
    return text.value.decode()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    library = nvrtc()
    stale = []
    for source in sorted(FOLDER.glob("*.cu")):
        ptx = compile_to_ptx(library, source)
        target = source.with_suffix(".ptx")
        if not arguments.check:
            target.write_text(ptx)
        elif not target.exists() or target.read_text() != ptx:
            stale.append(target.name)
    if stale:
        sys.exit(f"not what the sources compile to: {', '.join(stale)}")


if __name__ == "__main__":
    main()
