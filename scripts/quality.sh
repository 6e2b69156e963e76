#!/usr/bin/env bash
# Quality of SmolLM2-135M in every format that `convert --quantize` makes: perplexity on the first 2048 tokens of
# scripts/quality_text.py, and the divergence from fp32. Ten minutes on two cores. Results: benches/results/quality/*.json,
# which scripts/report.sh takes. The calibration's text begins with chapter 109 of the same book.
# Usage: scripts/quality.sh FOLDER [LAPIDARY]      FOLDER holds texts and packages (2 GB)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:?usage: scripts/quality.sh FOLDER [LAPIDARY]} lapidary=$(realpath "${2:-target/release/lapidary}")
results=$PWD/benches/results/quality model=$PWD/fixtures/smollm2/model.onnx
mkdir -p "$folder" "$results"
python3 scripts/smollm2_weights.py
python3 scripts/quality_text.py "$folder/book.txt"
python3 scripts/quality_text.py "$folder/whole.txt" --chapters 135
cd "$folder"
sed -n '/^CHAPTER 109/,$p' whole.txt > calibration.txt
convert() { [ -d "smollm2-$1" ] || "$lapidary" convert "$model" -o "smollm2-$1" --target cpu --capacity 512 "${@:2}"; }
convert fp32
convert int8 --quantize int8
convert int8-channel --quantize int8,group=channel
convert int4 --quantize int4
convert int4-calibrated --quantize int4 --calibrate calibration.txt
convert fp8 --quantize fp8
"$lapidary" perplexity smollm2-fp32 --text book.txt --tokens 2048 --window 512 --device cpu --json > "$results/smollm2-fp32.json"
for format in int8 int8-channel int4 int4-calibrated fp8; do
  "$lapidary" perplexity "smollm2-$format" --against smollm2-fp32 --text book.txt --tokens 2048 --window 512 --device cpu --json \
    > "$results/smollm2-$format.json"
done
