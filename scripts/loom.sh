#!/usr/bin/env bash
# The thread pool under loom: every order in which its threads can run. It is a separate crate (tests/loom) that compiles in
# seconds.
# Usage: scripts/loom.sh [cargo test arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../tests/loom"
RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-../../target}/loom" cargo test --quiet --locked "$@"
