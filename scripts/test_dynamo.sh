#!/usr/bin/env bash
# The worker of NVIDIA Dynamo (dynamo/): formatting, tests of its engine, Dynamo's conformance tests, and an end-to-end test with a frontend
# and two workers, one of which is killed. Installs protobuf-compiler, and the frontend into .venv-dynamo/ of this checkout.
# From nothing it compiles 800 crates, which takes 15 minutes of two cores and 4 GB.
# Usage: scripts/test_dynamo.sh [--if-changed]
#   --if-changed   only where the last commits changed dynamo/ or what it is made of. LAPIDARY_DYNAMO=1 runs it in any case,
#                  LAPIDARY_DYNAMO=0 in none; LAPIDARY_DYNAMO_BASE names the commit to compare with [default: the parent of HEAD].
# With .models/smollm2 (docs/tutorial.md) the end-to-end test runs with SmolLM2, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What the worker is made of, besides dynamo/ itself.
sources=(dynamo scripts/test_dynamo.sh src/serve src/decode/batch src/sample)

is_changed() {
  case "${LAPIDARY_DYNAMO:-}" in
    1) return 0 ;;
    0) return 1 ;;
  esac
  local base=${LAPIDARY_DYNAMO_BASE:-HEAD~1}
  # A checkout without history has nothing to compare with.
  git rev-parse --quiet --verify "$base^{commit}" >/dev/null || return 1
  ! git diff --quiet "$base" -- "${sources[@]}"
}

if [ "${1:-}" = --if-changed ] && ! is_changed; then
  echo "dynamo/ is unchanged: not tested (LAPIDARY_DYNAMO=1 tests it)"
  exit 0
fi

source scripts/setup.sh build
debian protobuf-compiler pkg-config

DYNAMO=1.6.1
python=.venv-dynamo/bin/python
if ! "$python" -c "import importlib.metadata as m; assert m.version('ai-dynamo') == '$DYNAMO'" 2>/dev/null; then
  say "installing ai-dynamo $DYNAMO into .venv-dynamo"
  rm -rf .venv-dynamo
  python3 -m venv .venv-dynamo
  # Its own list of dependencies has a package that cannot be installed, and engines that are not used here.
  .venv-dynamo/bin/pip install -q --disable-pip-version-check --no-deps "ai-dynamo==$DYNAMO"
  .venv-dynamo/bin/pip install -q --disable-pip-version-check "ai-dynamo-runtime==$DYNAMO" msgspec packaging pyyaml
fi

# Cargo reads dynamo/.cargo/config.toml when it is started there.
cd dynamo
cargo fmt --check
cargo test --locked --quiet
cargo build --locked --quiet --bin lapidary-dynamo --example tiny_package
cd ..
target=${CARGO_TARGET_DIR:-dynamo/target}/debug
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$target/examples/tiny_package" "$folder"
"$python" dynamo/e2e.py "$target/lapidary-dynamo" "$folder/tiny" --long 6000
if [ -d .models/smollm2 ]; then
  "$python" dynamo/e2e.py "$target/lapidary-dynamo" .models/smollm2 --long 120
fi
