#!/usr/bin/env bash
# Fuzzes the readers of untrusted files, and the sampler chain. docs/contributing/fuzzing.md describes the targets.
#
#   [LAPIDARY_FUZZ_PROFILE=quick] scripts/fuzz.sh [SECONDS] [TARGET...]
#
# Every input of fuzz/corpus is replayed first; then each target runs for SECONDS (20), with what it finds in
# fuzz/target/corpus. 0 seconds replay only. Needs a C++ compiler for libFuzzer, and no nightly Rust: the compiler's
# instrumentation is a code generation option. `cargo fuzz run TARGET` works as well, where it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-20}
shift || true
profile=${LAPIDARY_FUZZ_PROFILE:-release}
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(onnx package weights text sampler results)

coverage=sanitizer-coverage
flags=(-Cpasses=sancov-module "-Cllvm-args=-$coverage-level=4" "-Cllvm-args=-$coverage-inline-8bit-counters"
    "-Cllvm-args=-$coverage-pc-table" "-Cllvm-args=-$coverage-trace-compares" --cfg fuzzing)
host=$(rustc -vV | sed -n 's/^host: //p')
# With a target named, build scripts and macros are not instrumented.
RUSTFLAGS="${flags[*]}" cargo build --quiet --profile "$profile" --manifest-path fuzz/Cargo.toml --target "$host" --target-dir fuzz/target \
    $(printf -- '--bin %s ' "${targets[@]}")

# A malicious file must not use memory or time out of proportion to its size.
# Unoptimized code takes about ten times as long.
timeout=10
[ "$profile" != quick ] || timeout=100
limits=(-rss_limit_mb=2048 -malloc_limit_mb=512 "-timeout=$timeout" -print_final_stats=1 -verbosity=1)
memory=/dev/shm
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
LAPIDARY_FUZZ_FOLDER=$(mktemp -d "$memory/lapidary-fuzz.XXXXXX")
export LAPIDARY_FUZZ_FOLDER
trap 'rm -rf "$LAPIDARY_FUZZ_FOLDER"' EXIT
status=0
for target in "${targets[@]}"; do
    binary=fuzz/target/$host/$profile/$target
    found=fuzz/target/corpus/$target
    failures=fuzz/target/failures/$target
    mkdir -p "$found" "$failures"
    log=fuzz/target/$target.log
    if ! "$binary" "${limits[@]}" "-artifact_prefix=$failures/" -runs=0 "fuzz/corpus/$target" >"$log" 2>&1; then
        tail -30 "$log"
        echo "$target: an input of its corpus fails"
        status=1
        continue
    fi
    count=$(find "fuzz/corpus/$target" -type f | wc -l)
    if [ "$seconds" = 0 ]; then
        echo "$target: $count inputs replayed"
        continue
    fi
    if "$binary" "${limits[@]}" "-artifact_prefix=$failures/" "-max_total_time=$seconds" "$found" "fuzz/corpus/$target" \
        >"$log" 2>&1; then
        echo "$target: $count inputs replayed, $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") run in $seconds s"
    else
        tail -30 "$log"
        echo "$target: failed, see $failures"
        status=1
    fi
done
exit $status
