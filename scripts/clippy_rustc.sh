#!/usr/bin/env bash
# Compiles the crates of this workspace through Clippy, with warnings as errors. As RUSTC_WORKSPACE_WRAPPER, it lints in the
# compilation that the tests need; a separate `cargo clippy` would check all dependencies a second time.
exec clippy-driver "$@" -Dwarnings
