#!/usr/bin/env bash
# Installs what the tests need and runs all of them: formatting, lints, unit and integration tests, real TensorRT builds,
# canonical graphs in ONNX Runtime, `verify` against tract, the Python wheel, AddressSanitizer, loom, fuzzing, the documentation's site, the benchmark's scripts and notebook.
# About half an hour on two cores from nothing; docs/contributing/build-time.md has a breakdown.
# Usage: scripts/test.sh [cargo nextest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh build tensorrt onnx notebook
command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest

# Lints run in the compilation for the tests.
export RUSTC_WORKSPACE_WRAPPER=$PWD/scripts/clippy_rustc.sh
# Incremental compilation records are not worth their time in a full build.
[ -d "${CARGO_TARGET_DIR:-target}" ] || export CARGO_INCREMENTAL=0

stage() {
  local begun=$SECONDS
  printf '\033[2m%s\033[0m\n' "$*" >&2
  "$@"
  printf '\033[2m%s s: %s\033[0m\n' $((SECONDS - begun)) "$*" >&2
}

stage cargo fmt --check
stage scripts/deny.sh
stage scripts/check_features.sh
# trtx-sys's build script writes headers that it also watches, so Cargo takes its first run for outdated, and the next command
# would compile the binding and this crate again. Cargo compares with the time at which the script began: this makes it the
# time at which it ended.
settle() {
  local script
  for script in "${CARGO_TARGET_DIR:-target}"/debug/build/trtx-sys-*/; do
    [ ! -e "$script/root-output" ] || touch -r "$script/root-output" "$script/output"
  done
}

stage cargo nextest run --features tract "$@"
settle
# The program is compiled; the wheel needs it linked once more.
stage scripts/wheel.sh dev
stage cargo build --quiet --features tract --benches
# The quick start at the head of src/lib.rs.
stage cargo test --quiet --features tract --doc
# Full TensorRT from its headers: it compiles, and refuses what is not its library. With everything else as above, so that
# only the binding is compiled again.
full=(--no-default-features --features cli,tensorrt,tract)
stage cargo build --quiet "${full[@]}" --lib --bins --examples --test gpu --test tensorrt
settle
stage cargo nextest run "${full[@]}" --test tensorrt

# The library alone (no command line, no TensorRT), linted and under AddressSanitizer.
stage scripts/sanitize.sh
stage env -u RUSTC_WORKSPACE_WRAPPER scripts/loom.sh
# Every corpus is replayed, then 10 seconds a target.
stage env -u RUSTC_WORKSPACE_WRAPPER LAPIDARY_FUZZ_PROFILE=quick scripts/fuzz.sh 10

# docs/ as a site: a warning of mdBook fails.
stage scripts/book.sh
stage .venv/bin/python -m unittest discover -q -s scripts/baselines
# With the binary that was just built; fails if its answers are not ONNX Runtime's.
stage .venv/bin/jupyter-execute --timeout=300 docs/benchmark.ipynb
