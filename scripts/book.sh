#!/usr/bin/env bash
# Builds docs/ as a site in target/book with mdBook; fails on a warning.
# Usage: scripts/book.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh book
log=$(mktemp)
trap 'rm -f "$log"' EXIT
.venv/bin/mdbook build 2> "$log" || { cat "$log" >&2; exit 1; }
if grep -iE 'warn|error' "$log" >&2; then
  fail "mdbook warned: see above"
fi
say "target/book/index.html"
