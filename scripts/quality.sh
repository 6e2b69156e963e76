#!/usr/bin/env bash
# Quality of SmolLM2-135M in the formats that `convert --quantize` makes: perplexity on the first 2048 tokens of two texts of
# scripts/quality_text.py, and the divergence from fp32. Calibrated on other parts of both sources together. 25 minutes on two cores.
# Results: benches/results/quality/*.json, which scripts/report.sh takes.
# Usage: scripts/quality.sh FOLDER [LAPIDARY]      FOLDER holds texts and packages (2 GB)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:?usage: scripts/quality.sh FOLDER [LAPIDARY]} lapidary=$(realpath "${2:-target/release/lapidary}")
results=$PWD/benches/results/quality model=$PWD/fixtures/smollm2/model.onnx
mkdir -p "$folder" "$results"
python3 scripts/smollm2_weights.py
for text in book speeches calibration; do python3 scripts/quality_text.py "$folder/$text.txt" --text $text; done
cd "$folder"
convert() { [ -d "smollm2-$1" ] || "$lapidary" convert "$model" -o "smollm2-$1" --target cpu --capacity 512 "${@:2}"; }
convert fp32
convert int8 --quantize int8
convert int8-channel --quantize int8,group=channel
convert int4 --quantize int4
convert int4-asymmetric --quantize int4,asymmetric
convert int4-calibrated --quantize int4 --calibrate calibration.txt
convert int4-asymmetric-calibrated --quantize int4,asymmetric --calibrate calibration.txt
convert fp8 --quantize fp8
measure() { # FORMAT OPTION…
  for text in book speeches; do
    local name=$1; [ $text = book ] || name+=-$text
    "$lapidary" perplexity "smollm2-$1" "${@:2}" --text $text.txt --tokens 2048 --window 512 --device cpu --json > "$results/smollm2-$name.json"
  done
}
measure fp32
for format in int8 int8-channel int4 int4-asymmetric int4-calibrated int4-asymmetric-calibrated fp8; do
  measure $format --against smollm2-fp32
done
