#!/usr/bin/env bash
# From a fresh machine to an answer from a real model: installs what is needed, rebuilds SmolLM2's weights, builds
# Lapidary, converts the ONNX export, builds its TensorRT engines ahead of time (no GPU needed) and asks a question on
# the CPU. About 12 minutes on two cores from nothing, most of it compiling; seconds after that.
# Usage: scripts/demo.sh [QUESTION]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh build tensorrt weights

.venv/bin/python scripts/smollm2_weights.py
cargo build --release --quiet
lapidary=target/release/lapidary
package=.models/smollm2
# Made anew too if it is of a version whose packages this one does not read.
$lapidary info "$package" > /dev/null 2>&1 ||
  $lapidary convert fixtures/smollm2/model.onnx -o "$package" --force --spec specs/smollm2-tensorrt.yaml
$lapidary info "$package"
$lapidary generate "$package" --chat "${1:-What is the capital of France?}" --device cpu --temperature 0
