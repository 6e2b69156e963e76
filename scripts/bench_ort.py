#!/usr/bin/env python3
"""One measurement of an optimum export in ONNX Runtime on the CPU, for scripts/bench_cpu.py, after a warm-up.

    python scripts/bench_ort.py fixtures/smollm2/model.onnx --prompt-ids 1,2,3 --max-new-tokens 48 --threads 2

Prints one JSON line. Prefill is one run over the whole prompt with an empty cache; decode is the mean of the
single-token runs after it, the caches carried over without copies (IO binding). Needs onnxruntime and numpy.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime


class Decoder:
    """The export with its growing caches bound from output to input."""

    def __init__(self, model, threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        config = json.loads((model.parent / "config.json").read_text())
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        self.past = [value.name for value in self.session.get_inputs() if value.name.startswith("past_key_values")]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.empty = np.zeros((1, config["num_key_value_heads"], 0, head_dim), np.float32)
        self.reset()

    def reset(self):
        self.length = 0
        self.caches = {name: onnxruntime.OrtValue.ortvalue_from_numpy(self.empty) for name in self.past}

    def run(self, ids):
        """Milliseconds of one run, and the last logits."""
        positions = np.arange(self.length, self.length + len(ids), dtype=np.int64)[None]
        start = time.perf_counter()
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, self.length + len(ids)), np.int64))
        binding.bind_cpu_input("position_ids", positions)
        for name, value in self.caches.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        results = dict(zip(self.outputs, binding.get_outputs()))
        elapsed = (time.perf_counter() - start) * 1e3
        self.caches = {name: results[name.replace("past_key_values", "present")] for name in self.past}
        self.length += len(ids)
        return elapsed, results["logits"].numpy()[0, -1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt-ids", required=True, help="comma-separated")
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prompt = [int(token) for token in arguments.prompt_ids.split(",")]
    start = time.perf_counter()
    decoder = Decoder(arguments.model, arguments.threads)
    load = (time.perf_counter() - start) * 1e3
    _, logits = decoder.run(prompt)
    decoder.run([int(logits.argmax())])
    decoder.reset()
    prefill, logits = decoder.run(prompt)
    tokens, steps = [int(logits.argmax())], []
    while len(tokens) < arguments.max_new_tokens:
        elapsed, logits = decoder.run([tokens[-1]])
        steps.append(elapsed)
        tokens.append(int(logits.argmax()))
    report = {"tokens": tokens, "load_ms": load, "prefill_ms": prefill, "decode_ms": statistics.mean(steps)}
    print(json.dumps(report | {"version": onnxruntime.__version__}))


if __name__ == "__main__":
    main()
