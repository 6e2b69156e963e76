#!/usr/bin/env python3
"""Quantized SmolLM2-135M on the CPU: Lapidary beside ONNX Runtime and llama.cpp, in turn, in one run.

    python scripts/quantized_models.py MODELS
    python scripts/quantized_side_by_side.py MODELS --lapidary target/release/lapidary --modules NODE_FOLDER \
        [--rounds 5] [--output benches/results/quantized-smollm2.json]

All systems compute with the same weights (see quantized_models.py), with as many threads, a prompt of 128 tokens and 64
new ones, greedy. Each round starts every system once, in its own process, which first runs the text once and then
--runs times; so a slow minute of the machine affects all systems. Reported are medians over all rounds: milliseconds to the
first token (of a prompt of 128), milliseconds a token, and the peak of resident memory.

    lapidary      exact fp32: activations are not rounded
    onnxruntime   MatMulNBits with accuracy_level 0 (fp32) and 4 (activations rounded to int8), basic optimizations
    llama.cpp     Q4_0 and Q8_0 (activations rounded to int8), as the npm package node-llama-cpp ships it: --modules is
                  the folder that holds its node_modules; left out if it is not given

Lapidary's memory is that of `lapidary generate`, which holds nothing that a benchmark needs. Needs onnxruntime.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REFERENCE = json.loads((HERE.parent / "fixtures" / "smollm2" / "reference.json").read_text())
# A chat question, again and again.
PROMPT = (REFERENCE["prompt"] * 4)[:128]
NEW = 64
FORMS = ["int4", "int4-asym", "int8"]


def onnxruntime_worker(model, runs, threads):
    """The process of ONNX Runtime: caches bound from output to input without copies."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    past = {name: name.replace("past_key_values", "present") for name in inputs if name.startswith("past")}
    first = inputs[next(iter(past))]
    empty = np.zeros((1, first.shape[1], 0, first.shape[3]), np.float32)
    found = {"ttft_ms": [], "tpot_ms": []}
    for run in range(runs + 1):
        caches = {name: onnxruntime.OrtValue.ortvalue_from_numpy(empty) for name in past}
        length, feed, tokens, marks = 0, PROMPT, [], [time.perf_counter()]
        while len(tokens) < NEW:
            total = length + len(feed)
            binding = session.io_binding()
            binding.bind_cpu_input("input_ids", np.array([feed], np.int64))
            binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
            binding.bind_cpu_input("position_ids", np.arange(length, total, dtype=np.int64)[None])
            for name, value in caches.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            results = dict(zip(outputs, binding.get_outputs()))
            caches = {name: results[present] for name, present in past.items()}
            length = total
            tokens.append(int(results["logits"].numpy()[0, -1].argmax()))
            feed = tokens[-1:]
            marks.append(time.perf_counter())
        if run:
            found["ttft_ms"].append((marks[1] - marks[0]) * 1e3)
            found["tpot_ms"].append((marks[-1] - marks[1]) * 1e3 / (NEW - 1))
    found["tokens"] = tokens
    print(json.dumps(found))


def process(command, **settings):
    """Standard output of a command, and the peak of its resident memory in MB."""
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.PIPE, **settings)
        error = child.stderr.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            sys.exit(f"{' '.join(map(str, command[:3]))} … ended with {child.returncode}:\n{error[-2000:]}")
        out.seek(0)
        return out.read(), usage.ru_maxrss / 1024


class Lapidary:
    def __init__(self, given, form):
        self.given, self.package = given, given.models / f"{form}-package"
        if not self.package.exists():
            model = given.models / f"{form}-qdq.onnx"
            process([given.lapidary, "convert", model, "-o", self.package, "--target", "cpu"])

    def measure(self):
        common = ["--device", "cpu", "--threads", self.given.threads, "--json"]
        ids = ",".join(map(str, PROMPT))
        text, memory = process(
            [self.given.lapidary, "generate", self.package, "--prompt-ids", ids, "--max-new-tokens", NEW, "--ignore-eos"]
            + ["--temperature", "0", *common]
        )
        generated = json.loads(text)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as prompts:
            json.dump({"seed": 0, "timed": (PROMPT * 8)[:512], "prompts": [PROMPT]}, prompts)
            prompts.flush()
            text, _ = process(
                [self.given.lapidary, "bench", self.package, "--end-to-end", f"{len(PROMPT)}:{NEW}", "--warmup", 1]
                + ["--runs", self.given.runs, "--outputs", 0, "--prompts", prompts.name, *common]
            )
        runs = json.loads(text)["end_to_end"][0]["runs"]
        return {"ttft_ms": [run["ttft_ms"] for run in runs],
                "tpot_ms": [(run["latency_ms"] - run["ttft_ms"]) / (NEW - 1) for run in runs],
                "memory": memory, "tokens": generated["tokens"]}  # fmt: skip


class OnnxRuntime:
    def __init__(self, given, form, level):
        self.given = given
        self.model = given.models / f"{form}-nbits{'-level4' if level else ''}.onnx"

    def measure(self):
        text, memory = process([sys.executable, __file__, "--worker", self.model, self.given.runs, self.given.threads])
        return json.loads(text) | {"memory": memory}


class LlamaCpp:
    def __init__(self, given, form):
        self.given, self.model = given, given.models / f"{form}.gguf"

    def measure(self):
        ids = ",".join(map(str, PROMPT))
        text, memory = process(
            ["node", HERE / "llama_cpp_decode.mjs", self.model, ids, NEW, self.given.runs + 1, self.given.threads]
            + [self.given.modules.resolve()]
        )
        found = json.loads(text.strip().splitlines()[-1])
        return {"ttft_ms": found["ttft_ms"][1:], "tpot_ms": found["tpot_ms"][1:], "memory": memory,
                "tokens": found["tokens"]}  # fmt: skip


def table(found):
    lines = ["| form | system | ms a token | first token of 128, ms | peak memory, MB |", "|---|---|---|---|---|"]
    for form, systems in found["forms"].items():
        for name, row in systems.items():
            lines.append(f"| {form} | {name} | {row['tpot_ms']:.2f} | {row['ttft_ms']:.0f} | {row['peak_memory_mb']:.0f} |")
    return "\n".join(lines)


def main():
    if sys.argv[1:2] == ["--worker"]:
        return onnxruntime_worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--lapidary", type=Path, default=HERE.parent / "target" / "release" / "lapidary")
    parser.add_argument("--modules", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    cpu = next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    found = {"schema": "lapidary-side-by-side/1", "model": "SmolLM2-135M", "prompt": len(PROMPT), "new": NEW,
             "threads": given.threads, "rounds": given.rounds, "runs": given.runs, "cpu": cpu, "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
             "forms": {}}  # fmt: skip
    for form in given.forms.split(","):
        systems = {"lapidary": Lapidary(given, form)}
        systems["onnxruntime level 0"] = OnnxRuntime(given, form, 0)
        systems["onnxruntime level 4"] = OnnxRuntime(given, form, 4)
        if given.modules and (given.models / f"{form}.gguf").exists():
            systems["llama.cpp"] = LlamaCpp(given, form)
        samples = {name: [] for name in systems}
        for _ in range(given.rounds):
            for name, system in systems.items():
                samples[name].append(system.measure())
        first = samples["lapidary"][0]["tokens"]
        rows = found["forms"][form] = {}
        for name, runs in samples.items():
            every = {key: [x for run in runs for x in run[key]] for key in ("ttft_ms", "tpot_ms")}
            same = next((i for i, (a, b) in enumerate(zip(first, runs[0]["tokens"])) if a != b), NEW)
            rows[name] = {
                "tpot_ms": statistics.median(every["tpot_ms"]),
                "ttft_ms": statistics.median(every["ttft_ms"]),
                "peak_memory_mb": max(run["memory"] for run in runs),
                "tokens_equal_to_lapidary": same,
                "samples": every,
            }
    text = json.dumps(found, indent=1)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text + "\n")
    print(table(found))
    for form, systems in found["forms"].items():
        print(form, {name: row["tokens_equal_to_lapidary"] for name, row in systems.items()})


if __name__ == "__main__":
    main()
