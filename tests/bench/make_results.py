#!/usr/bin/env python3
"""Result files for the report's tests: the bench schema, with made-up times.

    python3 tests/bench/make_results.py [FOLDER [PEERS]]     # tests/bench/results and tests/bench/peers by default

Nothing here was measured. Numbers are drawn once, from a fixed seed, and summaries computed as docs/reference/benchmarks.md says.
"""

import json
import math
import random
import sys
from pathlib import Path

PEAK, BANDWIDTH = 989.5e12, 4.2e12
MODEL = {
    "name": "llama-1b", "dtype": "fp16", "weights_hash": "ab" * 32, "parameters": 1_100_000_000, "layers": 22,
    "hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 64, "vocabulary": 32000,
    "weight_bytes_per_token": 2_069_000_000, "kv_bytes_per_token_slot": 2 * 22 * 4 * 64 * 2,
    "matrix_parameters": 968_884_224,
}  # fmt: skip
MACHINE = {
    "cpu": "Xeon", "cores": 16, "memory_bytes": 128 << 30, "os": "Linux",
    "gpu": {"name": "NVIDIA H200", "driver": "580.1", "memory_bytes": 150109880320, "compute_capability": "9.0"},
    "copy_bandwidth_bytes_per_s": BANDWIDTH, "peak_flops": {"flops": PEAK, "source": "stated: for a test"},
}  # fmt: skip
PROMPTS = [{"tokens": 8192, "sha256": "11" * 32}, {"tokens": 17, "sha256": "22" * 32}]
RANDOM = random.Random(4)


def percentile(values, percent):
    values = sorted(values)
    rank = percent / 100 * (len(values) - 1)
    below = int(rank)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (rank - below)


def summary(values):
    mean = math.fsum(values) / len(values)
    spread = math.fsum((v - mean) ** 2 for v in values)
    stddev = math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else 0
    median = percentile(values, 50)
    return {
        "count": len(values), "mean": mean, "median": median, "stddev": stddev, "p50": median,
        "p90": percentile(values, 90), "p99": percentile(values, 99), "min": min(values), "max": max(values),
    }  # fmt: skip


def stable(values):
    quarter = len(values) // 4
    if not quarter:
        return False
    first, last = math.fsum(values[:quarter]) / quarter, math.fsum(values[-quarter:]) / quarter
    return max(first, last) <= 1.05 * min(first, last)


def samples(base, count, drift=0.0):
    return [round(base * (1 + 0.02 * RANDOM.random() + drift * i / count), 4) for i in range(count)]


def prefill(tokens, base, drift):
    times = samples(base, 8, drift)
    ms = summary(times)
    m = MODEL
    flop = (2 * m["matrix_parameters"] * tokens + 2 * m["hidden"] * m["vocabulary"]
            + 2 * m["layers"] * m["heads"] * m["head_dim"] * tokens * (tokens + 1))  # fmt: skip
    return {"tokens": tokens, "samples_ms": times, "ms": ms, "prefill_tokens_per_s": tokens / ms["median"] * 1e3,
            "mfu": flop / (ms["median"] / 1e3) / PEAK, "stable": stable(times)}  # fmt: skip


def decode(live, base, capacity, drift, gpu):
    times = samples(base, 16, drift)
    ms = summary(times)
    read = MODEL["weight_bytes_per_token"] + live * MODEL["kv_bytes_per_token_slot"]
    return {"live": live, "capacity": capacity, "samples_ms": times, "ms": ms, "gpu_ms": base * 0.96 if gpu else None,
            "output_tokens_per_s": 1e3 / ms["median"], "mbu": read / (ms["median"] / 1e3) / BANDWIDTH,
            "stable": stable(times)}  # fmt: skip


def end_to_end(prompt, new, ttft, base):
    runs = []
    for _ in range(4):
        between, first = samples(base, new - 1), samples(ttft, 1)[0]
        runs.append({"ttft_ms": first, "latency_ms": first + math.fsum(between) + 0.05, "tokens": new,
                     "itl_samples_ms": between})  # fmt: skip
    latencies = [r["latency_ms"] for r in runs]
    return {
        "prompt": prompt, "new_tokens": new, "runs": runs, "ttft_ms": summary([r["ttft_ms"] for r in runs]),
        "tpot_ms": summary([math.fsum(r["itl_samples_ms"]) / (new - 1) for r in runs]),
        "itl_ms": summary([(r["latency_ms"] - r["ttft_ms"]) / (new - 1) for r in runs]),
        "latency_ms": summary(latencies), "output_tokens_per_s": 4 * new / math.fsum(latencies) * 1e3,
        "stable": stable(latencies),
    }  # fmt: skip


def outputs(error):
    rows = []
    for step in range(4):
        top = [[40 + i, round((10 - i * 0.5) * (1 + (error if i % 2 else -error)), 5)] for i in range(8)]
        top.sort(key=lambda pair: -pair[1])
        rows.append({"prompt": 0, "step": step, "top": top, "norm": 30.0, "margin": round(top[0][1] - top[1][1], 5)})
    return {"prompts": [[5] * 17], "greedy_tokens": [[40] * 4], "logits": rows, "reference": None}


def profile(live, attention, products, rest):
    return {
        "live": live, "total_ms": attention + products + rest,
        "groups": {"attention": attention, "matrix products": products, "rest": rest},
        "layers": [["__myl_MulMean_myl0_0", rest], ["__myl_MulSum_myl0_1", products], ["_gemm_mha_v2_myl0_2", attention]],
    }  # fmt: skip


def engine(profile, build_ms):
    return {"profile": profile, "bytes": 8000000, "build_ms": build_ms}


def document(folder, file, system, variant, label, error=0.004, drift=0.0, settings=None, **parts):
    written = {
        "schema": "lapidary-bench/1",
        "system": {"name": system, "variant": variant, "label": label, "settings": settings or {}},
        "date": "2026-11-24T14:00:00+00:00", "command": f"measure {file}", "commit": "0123456789abcdef0123",
        "machine": MACHINE | parts.get("machine", {}), "versions": {system: "1.0", "cuda": "13.0"},
        "model": MODEL | {"dtype": parts.get("dtype", "fp16")} | parts.get("model", {}),
        "workload": {"batch": 1, "seed": 0, "prompts": PROMPTS},
        "prefill": [prefill(n, t, drift) for n, t in parts.get("prefill", {}).items()],
        "decode": [decode(n, t, c, drift, system == "lapidary") for n, (t, c) in parts.get("decode", {}).items()],
        "end_to_end": [end_to_end(16, 6, ttft, t) for ttft, t in parts.get("texts", [])],
        "load": {"load_ms": 900.0, "first_load_ms": parts.get("first_load")} | parts.get("load", {}),
        "memory": {"peak_host_bytes": 3 << 30, "device": parts.get("memory", {"total": 3 << 30})},
        "outputs": outputs(error),
    }  # fmt: skip
    if "error_text" in parts:
        del written["load"], written["outputs"]
    for key in ("profile", "build", "sizes", "error_text"):
        if key in parts:
            written["error" if key == "error_text" else key] = parts[key]
    (folder / f"{file}.json").write_text(json.dumps(written, indent=1) + "\n")


def main():
    here = Path(__file__).resolve().parent
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "results"
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"device": "cuda", "weights": "bind", "cache": "growing", "capacities": [256, 1024, 4096],
             "shapes": "static", "prefill_chunks": [128, 512], "cuda_graphs": True, "sampler": "greedy"}  # fmt: skip
    write = lambda *names, **parts: document(folder, *names, **parts)
    write("lapidary", "lapidary", "bind, growing cache", "lapidary", settings=usual, first_load=4200.0,
          decode={64: (1.18, 256), 300: (1.24, 1024), 4080: (1.62, 4096)}, prefill={128: 1.92, 512: 5.3},
          texts=[(1.95, 1.3)],
          memory={"weights": 2200000000, "cache": 92274688, "scratch": 30000000, "context": 500000000, "total": 2880000000},
          build={"engines": [engine("b1-t1-c256", 4400.0), engine("b1-t128-c256", 2600.0)]},
          sizes={"package_bytes": 2216000000, "plans_bytes": 16000000, "weights_bytes": 2200000000},
          profile={"decode": profile(316, 0.41, 0.95, 0.12), "prefill 512": profile(512, 0.4, 2.04, 0.6)})  # fmt: skip
    write("no-graphs", "lapidary", "bind, growing cache", "lapidary without CUDA graphs",
          settings=usual | {"cuda_graphs": False}, decode={300: (1.71, 1024)}, prefill={512: 5.5},
          load={"load_ms": 4100.0, "kernels_kept": False}, sizes={"package_bytes": None, "plans_bytes": 16000000, "weights_bytes": None},
          build={"engines": [engine("b1-t1-c256", None), engine("b1-t128-c256", None)]})  # fmt: skip
    write("one-capacity", "lapidary", "bind", "one capacity", decode={300: (1.62, 4096), 4080: (1.62, 4096)},
          settings=usual | {"cache": "one capacity", "capacities": [4096],
                            "ablation": {"group": "cache", "switch": "4096 slots"}})  # fmt: skip
    write("embedded", "lapidary", "embed", "embedded", drift=0.2, decode={300: (1.23, 1024)},
          settings=usual | {"weights": "embed", "ablation": {"group": "weights", "switch": "embed"}})  # fmt: skip
    write("eager", "transformers", "eager, SDPA", "transformers eager", error=0.006, prefill={128: 11.9, 512: 12.4},
          decode={64: (11.3, None), 300: (11.2, None), 4080: (11.9, None)}, texts=[(12.4, 11.6)])  # fmt: skip
    write("compiled", "transformers", "static cache + compile", "transformers static + compile", error=0.005,
          prefill={128: 3.9, 512: 5.1}, decode={64: (3.15, 4096), 300: (3.2, 4096), 4080: (3.4, 4096)},
          texts=[(6.2, 3.3)])  # fmt: skip
    write("static", "transformers", "static cache", "transformers static cache", error=0.3, drift=0.4,
          prefill={512: 13.4}, decode={300: (12.8, 4096), 4080: (13.0, 4096)})  # fmt: skip
    write("reference", "transformers", "fp32 reference", "transformers fp32", error=0.0, dtype="fp32",
          machine={"copy_bandwidth_bytes_per_s": 4.0e12, "peak_flops": {"flops": 700e12, "source": "measured: of fp16, for a test"}})  # fmt: skip
    write("parser", "tensorrt-onnx-parser", "engine", "TensorRT ONNX parser",
          error_text="the parser has no importer for Attention")  # fmt: skip
    peers(Path(sys.argv[2]) if len(sys.argv) > 2 else here / "peers", usual)


def peers(folder, usual):
    """A session with a peer, with weights in two formats; a server's result; quantized forms on the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    write = lambda *names, **parts: document(folder, *names, **parts)
    genai = {"capacity": 4096, "cuda_graph": True}
    write("llama-1b-peer-lapidary", "lapidary", "bind, growing cache", "Lapidary", settings=usual,
          decode={300: (0.75, 1024), 4080: (0.82, 4096)}, prefill={37: 1.1, 512: 2.9})  # fmt: skip
    write("llama-1b-peer-onnxruntime-genai", "onnxruntime-genai", "ONNX Runtime GenAI, CUDA graph",
          "ONNX Runtime GenAI", settings=genai | {"weight_bits": 16},
          decode={300: (0.9, 4096), 4080: (1.1, 4096)}, prefill={37: 2.0, 512: 2.8})  # fmt: skip
    write("llama-1b-peer-lapidary-int4", "lapidary", "bind, growing cache", "Lapidary int4", settings=usual, error=0.05,
          model={"weights_hash": "cd" * 32}, decode={300: (0.5, 1024)}, prefill={37: 1.2})  # fmt: skip
    write("llama-1b-peer-onnxruntime-genai-int4", "onnxruntime-genai", "ONNX Runtime GenAI, CUDA graph, int4 weights",
          "ONNX Runtime GenAI int4", settings=genai | {"weight_bits": 4}, error=0.06,
          decode={300: (0.8, 4096)}, prefill={37: 2.4})  # fmt: skip
    levels = []
    for clients, rate in ((1, 200.0), (4, 700.0), (16, 1800.0)):
        requests, new = 4 * clients, 64
        times = lambda base: summary(samples(base, 8))  # noqa: E731
        seconds = requests * new / rate
        levels.append({"clients": clients, "requests": requests, "seconds": seconds, "tokens_per_s": requests * new / seconds,
                       "requests_per_s": requests / seconds, "tokens_per_step": clients * 0.9, "ttft_ms": times(9.0 * clients),
                       "itl_ms": times(4.0 + clients / 4), "e2e_ms": times(300.0 + clients)})  # fmt: skip
    serving = {"schema": "lapidary.bench.serve/1", "date": "2026-11-24T14:00:00+00:00", "command": "bench", "commit": "0123",
               "package": "llama-1b", "device": "NVIDIA H200", "engine": "TensorRT", "cores": 16, "prompt_tokens": 128,
               "new_tokens": 64, "prefill_chunk": 128, "levels": levels}  # fmt: skip
    (folder / "serve.json").write_text(json.dumps(serving, indent=1) + "\n")

    def row(tpot, ttft, memory, equal):
        every = {"tpot_ms": samples(tpot, 4), "ttft_ms": samples(ttft, 4)}
        return {name: percentile(values, 50) for name, values in every.items()} | {
            "peak_memory_mb": memory, "tokens_equal_to_lapidary": equal, "samples": every}  # fmt: skip

    forms = {"int4": {"lapidary": row(6.0, 150.0, 116.0, 64), "onnxruntime level 4": row(16.0, 190.0, 324.0, 56),
                      "llama.cpp": row(8.0, 140.0, 334.0, 64)}}  # fmt: skip
    quantized = {"schema": "lapidary-side-by-side/1", "model": "SmolLM2-135M", "prompt": 128, "new": 64, "threads": 2,
                 "rounds": 2, "runs": 2, "cpu": "AMD EPYC", "date": "2026-11-24", "python": "3", "forms": forms}  # fmt: skip
    (folder / "side-by-side.json").write_text(json.dumps(quantized, indent=1) + "\n")


if __name__ == "__main__":
    main()
