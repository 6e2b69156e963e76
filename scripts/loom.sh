#!/usr/bin/env bash
# The thread pool under loom: every order in which its threads can run. A crate of its own (tests/loom) that compiles in
# seconds.
# Usage: scripts/loom.sh [cargo test arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../tests/loom"
RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-../../target}/loom" cargo test --quiet --locked "$@"
