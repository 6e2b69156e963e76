#!/usr/bin/env bash
# REPORT.md and its plots from everything under benches/results. Usage: scripts/report.sh [LAPIDARY]
# Another lapidary than target/release/lapidary can be named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
packages=()
for file in benches/results/conversions/*.json; do packages+=(--package "$file"); done
results=$(find benches/results -name '*.json' -not -path '*/conversions/*' | sort)
# shellcheck disable=SC2086 # names without spaces, all of them ours
exec "${1:-target/release/lapidary}" report $results "${packages[@]}" -o REPORT.md
