#!/usr/bin/env bash
# Runs on the GPU host, from the root of the tree that was carried there. Calls are short, because a borrowed machine can be taken
# back, and only what a call that ended left under $OUT is safe.
#   host.sh keep N       in the call that carries .gpu/pN: copies it to where later calls find it
#   host.sh start        starts what needs torch alone (exports, references) in a session of its own; wants part 3's wheels
#   host.sh start-peers  the same for scripts/gpu/peers.py; wants the wheel of onnxruntime-genai-cuda among part 3's
#   host.sh peers        with onnxruntime-gpu's wheel there (ort-gpu.*, cut into pieces): installs it
#   host.sh setup        with all parts there: TensorRT, binaries, wheels, plans, SmolLM2
#   host.sh run STAGE…   stages of scripts/gpu/run.py; BENCH_SECONDS bounds those of the benchmark, which go on in the next call
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
kept=/tmp/lapidary-parts
export LAPIDARY_BIN=/tmp/lapidary-gpu LAPIDARY_WORK=/dev/shm/work LAPIDARY_CACHE=/dev/shm/work/cache PYTHONUNBUFFERED=1
export OUT=${OUT:-$PWD/benches/results} SMOLLM2_GGUF=/tmp/smollm2/model.gguf TENSORRT_RTX_LIB=/tmp/tensorrt/libtensorrt_rtx.so.1
export PYTHONPATH=/tmp/lapidary-site
mkdir -p "$kept" "$OUT" "$LAPIDARY_BIN" "$LAPIDARY_WORK" /tmp/smollm2 /tmp/tensorrt

wheels() { [ -d /tmp/lapidary-site ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/lapidary-site "$kept"/python/*.whl; }

case ${1:-} in
  keep) cp -r ".gpu/p$2/." "$kept/" ;;
  start | start-peers)
    wheels
    stage=prepare && [ "$1" = start ] || stage=peers-prepare
    # From a copy: the next call writes this tree again.
    mkdir -p /tmp/lapidary-tree && cp -r scripts fixtures /tmp/lapidary-tree/ && cd /tmp/lapidary-tree
    OUT=$kept BENCH_SECONDS=900 setsid nohup python3 scripts/gpu/run.py $stage > "$kept/prepare.log" 2>&1 < /dev/null &
    ;;
  peers)
    wheel=/tmp/onnxruntime_gpu-1.31.1-cp312-cp312-manylinux_2_28_x86_64.whl
    cat "$kept"/ort-gpu.* > $wheel && rm "$kept"/ort-gpu.*
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/lapidary-site $wheel && rm $wheel
    ;;
  setup)
    cat "$kept"/gguf.[1245] > $SMOLLM2_GGUF
    cat "$kept"/tensorrt.[04] | xz -dc > $TENSORRT_RTX_LIB.part && mv $TENSORRT_RTX_LIB.part $TENSORRT_RTX_LIB &
    xz -dc "$kept/binaries.tar.xz" | tar -x -C "$LAPIDARY_BIN" &
    wheels
    xz -dc "$kept/python/libtensorrt_onnxparser_rtx.so.1.xz" > /tmp/tensorrt/libtensorrt_onnxparser_rtx.so.1
    if [ -e "$kept/plans.tar.xz" ]; then
      mkdir -p "$LAPIDARY_WORK/plans"
      xz -dc "$kept/plans.tar.xz" | tar -x -C "$LAPIDARY_WORK/plans"
    fi
    for kind in quantized families embeddings; do
      if [ -e "$kept/$kind.tar.xz" ]; then xz -dc "$kept/$kind.tar.xz" | tar -x -C "$kept"; fi
    done
    # Results of an earlier machine: their jobs are not run again.
    for archive in "$kept"/results/bench-*.tar.gz; do
      [ -e "$archive" ] || continue
      folder=$LAPIDARY_WORK/bench/$(basename "${archive##*/bench-}" .tar.gz)/results
      mkdir -p "$folder" && tar -xzf "$archive" -C "$folder"
    done
    wait
    "$LAPIDARY_BIN/lapidary" doctor
    # Packages are made of the exports that `start` writes.
    if [ -e "$kept/prepare.log" ]; then
      for _ in $(seq 150); do grep -q '"seconds"' "$kept/gpu-prepare.json" 2>/dev/null && break; sleep 1; done
      grep -E "took|FAILED" "$kept/prepare.log"
    fi
    ;;
  run)
    shift
    mkdir -p .gpu && cp "$kept/commit" .gpu/ && LAPIDARY_COMMIT=$(cat "$kept/commit") && export LAPIDARY_COMMIT
    exec python3 scripts/gpu/run.py "$@"
    ;;
  *) sed -n '2,11p' "$0"; exit 2 ;;
esac
