#!/usr/bin/env bash
# Compiles the crates of this workspace through Clippy, with warnings as errors. Set as RUSTC_WORKSPACE_WRAPPER, the compilation
# that the tests need is the one that is linted: `cargo clippy` beside it would check all dependencies a second time.
exec clippy-driver "$@" -Dwarnings
