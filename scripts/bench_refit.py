#!/usr/bin/env python3
"""Cost of strip and refit for SmolLM2: remaining bytes, seconds compared with `cp` of the same bytes, peak memory; also with a
LoRA adapter.

    scripts/bench_refit.py [--binary target/release/lapidary] [--rounds 5] [-o benches/results/refit-smollm2.json]

`cp` copies the weights file and syncs it, as `refit` does; both read from the page cache and write to the same disk,
alternating. Peak memory is anonymous pages only (RssAnon), sampled: mapped files are not counted. Needs the built weights
(scripts/smollm2_weights.py) and only Python.
"""

import argparse
import array
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command):
    """Seconds, and the peak of the process's anonymous memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak] + [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")])
        except OSError:
            pass
        time.sleep(0.002)
    if process.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return time.perf_counter() - start, peak / 1024


def size(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def adapter(folder, rank=16):
    """A PEFT adapter of every attention and feed-forward layer, small numbers."""
    config = json.loads((ROOT / "fixtures/smollm2/config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
             "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
             "mlp.down_proj": (hidden, wide)}
    header, data = {}, bytearray()
    generator = random.Random(0)
    for layer in range(config["num_hidden_layers"]):
        for module, (out, width) in sizes.items():
            for half, shape in (("lora_A", (rank, width)), ("lora_B", (out, rank))):
                numbers = array.array("f", (generator.uniform(-0.01, 0.01) for _ in range(shape[0] * shape[1])))
                start = len(data)
                data += numbers.tobytes()
                name = f"base_model.model.model.layers.{layer}.{module}.{half}.weight"
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted({m.split(".")[1] for m in sizes})}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/lapidary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=ROOT / ".models", help="on the disk to measure")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        folder = Path(folder)
        whole, bare, checkpoint = folder / "whole", folder / "bare", folder / "checkpoint"
        model = ROOT / "fixtures/smollm2/model.onnx"
        run(options.binary, "convert", model, "-o", whole, "--dtype", "fp16", "--target", "cpu")
        run(options.binary, "weights", whole, "--export", checkpoint)
        run(options.binary, "strip", whole, "-o", bare)
        left = size(bare) / size(whole)
        source = checkpoint / "model.safetensors"
        lora = adapter(folder / "adapter")
        samples = []
        for _ in range(options.rounds):
            copy = folder / "copy"
            copied, _ = run("sh", "-c", f"cp {source} {copy} && sync {copy}")
            copy.unlink()
            target = folder / "target"
            shutil.copytree(bare, target)
            refitted, anonymous = run(options.binary, "refit", target, "--from", source)
            shutil.rmtree(target)
            shutil.copytree(bare, target)
            merged, of_merge = run(options.binary, "refit", target, "--from", source, "--lora", lora)
            shutil.rmtree(target)
            samples.append({"cp_s": copied, "refit_s": refitted, "refit_anonymous_mb": anonymous, "lora_s": merged,
                            "lora_anonymous_mb": of_merge})
    median = lambda key: statistics.median(s[key] for s in samples)
    row = {
        "stripped_share_of_bytes": left,
        "cp_s": median("cp_s"),
        "refit_s": median("refit_s"),
        "refit_share_of_cp_speed": median("cp_s") / median("refit_s"),
        "refit_anonymous_mb": max(s["refit_anonymous_mb"] for s in samples),
        "lora_s": median("lora_s"),
        "lora_anonymous_mb": max(s["lora_anonymous_mb"] for s in samples),
    }
    for key, value in row.items():
        print(f"{key:28}{value:10.4f}")
    if options.output:
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
        document = {
            "what": "SmolLM2-135M fp16: strip, refit from safetensors, beside cp of the same bytes; medians",
            "command": " ".join(sys.argv),
            "machine": {"cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "commit": commit},
            "row": row,
            "samples": samples,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
