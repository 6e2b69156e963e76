#!/usr/bin/env bash
# Checks that the library alone does not depend on crates of the command line, the server or the report.
# Usage: scripts/check_features.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

unwanted='axum|tokio|hyper|llguidance|clap|clap_builder|clap_derive|terminal_size|ctrlc|indicatif|console|rustyline|resvg|usvg|plotters|dejavu|csv'
for features in '' tensorrt-rtx tensorrt tract; do
    tree=$(cargo tree --quiet --no-default-features --features "$features" --edges normal --prefix none)
    if found=$(grep -E "^($unwanted) v" <<<"$tree"); then
        echo "with --no-default-features --features '$features' the library depends on:" >&2
        echo "$found" >&2
        exit 1
    fi
done
# The names above are those of the dependencies: with the command line they are there.
tree=$(cargo tree --quiet --edges normal --prefix none)
for crate in ${unwanted//|/ }; do
    grep -q "^$crate v" <<<"$tree" || { echo "$crate is no dependency at all: correct this list" >&2; exit 1; }
done
echo "the library alone has none of: ${unwanted//|/ }"
