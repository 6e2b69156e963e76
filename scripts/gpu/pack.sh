#!/usr/bin/env bash
# Makes .gpu/: what a bare GPU host needs besides this tree. TensorRT (see ../shared/gpu/pack.sh) and our release binaries.
# Usage: scripts/gpu/pack.sh [TARGET_DIR [OUT]]   (after `cargo build --release --bin lapidary --example gpu_lab`)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=${1:-$root/target}
out=${2:-$root/.gpu}
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for file in "$target/release/lapidary" "$target/release/examples/gpu_lab" ${EXTRA_BINARIES:-}; do
  name=$(basename "$file")
  strip -o "$scratch/${name%%-????????????????}" "$file"
done
tar -C "$scratch" -c . | xz -T1 -6 > "$out/binaries.tar.xz"
git -C "$root" rev-parse HEAD > "$out/commit"
ls -l "$out"
