#!/usr/bin/env bash
# Checks licenses, banned crates and sources of all dependencies with cargo-deny (deny.toml). Needs no network except for the
# crates themselves. Advisories need the RustSec database: `scripts/deny.sh advisories`.
# Usage: scripts/deny.sh [cargo-deny checks]     (default: bans licenses sources)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh deny
[ $# -gt 0 ] || set -- bans licenses sources
exec .venv/bin/cargo-deny --log-level warn check --hide-inclusion-graph "$@"
