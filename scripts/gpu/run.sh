#!/usr/bin/env bash
# Everything that needs a GPU, on a bare host: no network, no Rust. Wants .gpu/ (scripts/gpu/pack.sh and TensorRT's pack),
# and a Python with torch, transformers and onnx. Results go to $OUT as JSON.
#   scripts/gpu/run.sh STAGE…      stages: tiny suite forms 1b 8b (all of them by default), bench-1b bench-8b bench-smollm2 ablations-1b
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT=${OUT:-$PWD/benches/results} LAPIDARY_BIN=${LAPIDARY_BIN:-/tmp/lapidary-gpu}
mkdir -p "$OUT" "$LAPIDARY_BIN"
(xz -dc .gpu/binaries.tar.xz | tar -x -C "$LAPIDARY_BIN") &
. .gpu/unpack.sh
# What the benchmark's baselines need: pack_python.sh, pack_smollm2.sh.
for more in .gpu/python/unpack.sh .gpu/smollm2-b/unpack.sh; do [ ! -e "$more" ] || . "$more"; done
wait
"$LAPIDARY_BIN/lapidary" doctor
exec python3 scripts/gpu/run.py "$@"
