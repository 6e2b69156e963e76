#!/usr/bin/env bash
# Builds the Python wheel and tries it in a clean virtual environment, without any variable: the program runs, finds the
# TensorRT-RTX library of the extra `tensorrt-rtx`, builds an engine and generates text. The wheel stays in target/wheels.
# Usage: scripts/wheel.sh [dev|release]
#   dev (default): the program as the tests compile it, stripped. After `scripts/test.sh` only the program is linked again.
#   release: the wheel to publish, with the default features.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh build wheel tensorrt
profile=${1:-dev}
wheels=${CARGO_TARGET_DIR:-target}/wheels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

features=()
if [ "$profile" = dev ]; then
  # The features and the compiler of scripts/test.sh: with others, Cargo compiles this crate again.
  features=(--features tract)
  export RUSTC_WORKSPACE_WRAPPER=$PWD/scripts/clippy_rustc.sh
fi
rm -rf "$wheels"
.venv/bin/maturin build --quiet --locked --profile "$profile" "${features[@]}" --strip true --out "$wheels"
wheel=$(echo "$wheels"/lapidary-*.whl)
say "$(du -h "$wheel" | cut -f1) $wheel"

python3 -m venv "$work/env"
# The library's wheel is there from the setup; from an index it is 86 MB.
"$work/env/bin/pip" install -q --disable-pip-version-check --find-links .venv/wheels "$wheel[tensorrt-rtx]"
# Neither the variables of this script nor an active environment may help.
clean() { env -i HOME="$work" PATH=/usr/bin:/bin NO_COLOR=1 "$@"; }
lapidary=$work/env/bin/lapidary
clean "$lapidary" --version
clean "$lapidary" doctor --json=compact > "$work/doctor.json"
"$work/env/bin/python" - "$work/doctor.json" "$work/env" <<'PY'
import json, os, sys
library = json.load(open(sys.argv[1]))["tensorrt"]["library"]
assert library, "the TensorRT-RTX library was not found"
assert os.path.realpath(library["path"]).startswith(os.path.realpath(sys.argv[2])), library
print("TensorRT-RTX", library["version"], "of the wheel's environment")
PY
clean "$lapidary" --quiet convert fixtures/exports/llama-optimum/model.onnx -o "$work/package" --target cpu,tensorrt-rtx \
  --capacity 16 --prefill 4 --json=compact > /dev/null
clean "$lapidary" --quiet generate "$work/package" --prompt-ids 1,20,5 --max-new-tokens 4 --device cpu --temperature 0
clean "$lapidary" completions bash > /dev/null
clean "$lapidary" man "$work/man"
test -s "$work/man/lapidary-convert.1"
