#!/usr/bin/env bash
# The executor, its kernels and the front end under AddressSanitizer: reads and writes outside of allocations, and of freed
# ones. Without TensorRT, tract and the command line, so that little is compiled; in a separate target folder, because every
# dependency is compiled for it. Processor time: 6 minutes to compile from nothing, 2 to run.
# Usage: scripts/sanitize.sh [cargo nextest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The sanitizer is not stable yet. A target given by name keeps build scripts and macros, which run on the host, as they are.
host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/sanitize"
# The pool of the process lives to its end, which is no leak.
export ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1"

# Not the library's unit tests: they would compile the crate a second time, and the pool is under loom.
cargo nextest run --target "$host" --no-default-features --test executor --test frontend "$@"
