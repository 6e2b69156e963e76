#!/usr/bin/env bash
# Installs what the tests need and runs all of them: formatting, lints, unit and integration tests, real TensorRT
# builds, canonical graphs in ONNX Runtime, `verify` against tract, the benchmark's scripts and notebook. About 20 minutes on
# two cores from nothing.
# Usage: scripts/test.sh [cargo nextest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh build tensorrt onnx notebook
command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest

cargo fmt --check
cargo clippy --quiet --all-targets --features tract -- -D warnings
cargo clippy --quiet --no-default-features --features tract -- -D warnings
cargo nextest run --features tract "$@"
# Full TensorRT from its headers: it compiles, and refuses what is not its library. About a minute: with tract, so that only
# the binding is built anew.
full=(--no-default-features --features tensorrt,tract)
cargo clippy --quiet "${full[@]}" --all-targets -- -D warnings
cargo nextest run "${full[@]}" --test tensorrt

.venv/bin/python -m unittest discover -q -s scripts/baselines
# With the binary that was just built; fails if its answers are not ONNX Runtime's.
.venv/bin/jupyter-execute --timeout=300 docs/benchmark.ipynb
