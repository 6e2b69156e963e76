#!/usr/bin/env bash
# Packs what the baselines need and a GPU host's Python lacks: blake3, gguf, TensorRT-RTX's Python bindings and its own ONNX
# parser (8 MB together). Usage: scripts/gpu/pack_python.sh [OUT]     default: .gpu/python
# pack.sh takes them along, host.sh puts them in place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-.gpu/python}
source scripts/setup.sh tensorrt
mkdir -p "$out"
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$out" \
  blake3==1.0.11 gguf==0.19.0 tensorrt-rtx-cu12-bindings==1.6.1.120
xz -T1 -6 -c "$(dirname "$TENSORRT_RTX_LIB")/libtensorrt_onnxparser_rtx.so.1" > "$out/libtensorrt_onnxparser_rtx.so.1.xz"
ls -l "$out"
