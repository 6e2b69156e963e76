#!/usr/bin/env bash
# Makes .gpu/: what a bare GPU host needs besides this tree, in two halves, because one journey there carries 64 MiB.
#   .gpu/a   most of TensorRT-RTX, compressed: copy `.gpu/a/trt.part0` to /tmp there
#   .gpu/b   the rest of it, our binaries and the commit: `. .gpu/b/setup.sh` there, then scripts/gpu/run.sh
#
# Usage: scripts/gpu/pack.sh TENSORRT_PACK     the folder that ../shared/gpu/pack.sh made
# Before: cargo build --release --bin lapidary --example gpu_lab, and cargo test --no-run --test executor --test gpu.
# EXTRA_BINARIES: more executables to take along.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tensorrt=${1:?usage: scripts/gpu/pack.sh TENSORRT_PACK}
half=$((40 << 20))
mkdir -p .gpu/a .gpu/b
if [ ! -s .gpu/a/trt.part0 ]; then
  head -c $half "$tensorrt/libtensorrt_rtx.so.1.xz" > .gpu/a/trt.part0
  tail -c +$((half + 1)) "$tensorrt/libtensorrt_rtx.so.1.xz" > .gpu/b/trt.part1
fi
cp "$tensorrt/unpack.sh" .gpu/b/
cat > .gpu/b/setup.sh <<'S'
# Source this on the GPU host: puts both halves together where scripts/gpu/run.sh looks.
mkdir -p .gpu
cp .gpu/b/binaries.tar.xz .gpu/b/unpack.sh .gpu/b/commit .gpu/
[ -s .gpu/libtensorrt_rtx.so.1.xz ] || cat /tmp/trt.part0 .gpu/b/trt.part1 > .gpu/libtensorrt_rtx.so.1.xz
S
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The newest test binary of each name: cargo leaves older ones beside it.
newest() { find target/debug/deps -maxdepth 1 -type f -executable -name "$1-????????????????" -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2; }
for file in target/release/lapidary target/release/examples/gpu_lab "$(newest executor)" "$(newest gpu)" ${EXTRA_BINARIES:-}; do
  name=$(basename "$file")
  strip -o "$scratch/${name%%-????????????????}" "$file"
done
tar -C "$scratch" -c . | xz -T2 -6 > .gpu/b/binaries.tar.xz
commit=$(git rev-parse HEAD)
git diff --quiet HEAD || commit+="+changes"
echo "$commit" > .gpu/b/commit
du -h .gpu/a/* .gpu/b/*
