#!/usr/bin/env python3
"""SmolLM2-135M on the CPU: Lapidary (f16 and f32 weights), ONNX Runtime and tract, side by side in one run.

Each system runs in a process of its own, all with the same number of threads, in rounds (A B C A B C ...) so that a
slow minute of the machine falls on everybody; the table gives the median of the rounds and the ratio to ONNX Runtime.
Greedy tokens of every system are compared first: a faster wrong answer is not a result.

    scripts/bench_cpu.py --threads 2 --rounds 3 -o benches/results/cpu-smollm2.json

Needs the release binaries (`cargo build --release --features tract --bins --examples`), the built weights
(scripts/smollm2_weights.py) and, in the Python that runs it, onnxruntime and numpy. Exit status 1 when systems disagree.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = {37: None, 512: None}
DECODED = 48


def prompt(length):
    """The reference prompt, repeated to the length asked for: real text ids, the same for every system."""
    ids = json.loads((ROOT / "fixtures/smollm2/reference.json").read_text())["prompt"]
    return (ids * (length // len(ids) + 1))[:length]


def run(command):
    """The last JSON line of a command's output, with the peak resident memory of its process."""
    done = subprocess.run(["/usr/bin/env", "python3", "-c", WAIT, *map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    *_, usage = done.stderr.strip().splitlines()
    start = done.stdout.index("{")
    return json.loads(done.stdout[start:]) | {"peak_rss_mb": int(usage) / 1024}


# Runs a command and reports the peak resident set of that child alone, in KiB, as the last line of stderr.
WAIT = "import resource,subprocess,sys;c=subprocess.run(sys.argv[1:]).returncode;print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,file=sys.stderr);sys.exit(c)"


def measured_by(command):
    def measure(ids):
        return run([*command, "--prompt-ids", ",".join(map(str, ids)), "--max-new-tokens", DECODED])

    return measure


def machine():
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    flags = next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True).stdout
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "simd": sorted(set(re.findall(r"\b(avx2|avx512f|f16c|fma)\b", flags))),
        "kernel": platform.release(),
        "commit": commit + ("+changes" if dirty.strip() else ""),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--binaries", type=Path, default=ROOT / "target/release")
    parser.add_argument("--skip", action="append", default=[], help="leave a system out, for example tract")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    model = ROOT / "fixtures/smollm2/model.onnx"
    binaries = options.binaries / "examples"
    with tempfile.TemporaryDirectory() as folder:
        packages = {}
        for dtype in ("fp16", "fp32"):
            packages[dtype] = Path(folder) / dtype
            subprocess.run(
                [options.binaries / "lapidary", "convert", model, "-o", packages[dtype], "--dtype", dtype,
                 "--target", "cpu", "--capacity", "256,1024"],
                check=True,
            )  # fmt: skip
        systems = {
            "lapidary f16": measured_by([binaries / "bench_session", packages["fp16"], "--threads", options.threads]),
            "lapidary f32": measured_by([binaries / "bench_session", packages["fp32"], "--threads", options.threads]),
            "onnxruntime f32": measured_by([sys.executable, ROOT / "scripts/bench_ort.py", model, "--threads", options.threads]),
            "tract f32": measured_by([binaries / "tract_baseline", model, "--threads", options.threads]),
        }
        systems = {name: measure for name, measure in systems.items() if not any(s in name for s in options.skip)}
        samples = []
        for round_ in range(options.rounds):
            for length in PROMPTS:
                for name, measure in systems.items():
                    print(f"round {round_ + 1}/{options.rounds}, {length} tokens, {name}", file=sys.stderr)
                    samples.append({"system": name, "prompt_tokens": length} | measure(prompt(length)))

    disagreements = 0
    for length in PROMPTS:
        expected = next(s["tokens"] for s in samples if s["prompt_tokens"] == length and "onnx" in s["system"])
        for sample in samples:
            if sample["prompt_tokens"] == length and sample["tokens"][:16] != expected[:16]:
                disagreements += 1
                print(f"{sample['system']} gives other tokens at {length}: {sample['tokens'][:16]}", file=sys.stderr)

    def median(system, length, field):
        return statistics.median(
            s[field] for s in samples if s["system"] == system and s["prompt_tokens"] == length
        )

    rows = []
    for name in systems:
        row = {"system": name}
        for length in PROMPTS:
            row[f"prefill_{length}_ms"] = median(name, length, "prefill_ms")
        row["decode_ms"] = median(name, 37, "decode_ms")
        row["peak_rss_mb"] = max(s["peak_rss_mb"] for s in samples if s["system"] == name)
        rows.append(row)
    base = next(row for row in rows if "onnx" in row["system"])
    print(f"{'':18}{'prefill 37':>18}{'prefill 512':>18}{'decode':>18}{'peak MB':>10}")
    for row in rows:
        cells = "".join(
            f"{row[field]:9.1f} ms {base[field] / row[field]:4.2f}x"
            for field in ("prefill_37_ms", "prefill_512_ms", "decode_ms")
        )
        print(f"{row['system']:18}{cells}{row['peak_rss_mb']:10.0f}")
    if options.output:
        document = {
            "what": "SmolLM2-135M on the CPU; medians; ratios are to ONNX Runtime, above 1 is faster",
            "command": " ".join(sys.argv),
            "machine": machine(),
            "threads": options.threads,
            "rows": rows,
            "samples": samples,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if disagreements else 0)


if __name__ == "__main__":
    main()
