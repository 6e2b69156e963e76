#!/usr/bin/env python3
"""How fast ONNX Runtime is on the fp32 optimum export of SmolLM2: prefill of 37 and 512 tokens, and decode.

    python scripts/bench_ort.py /work/models/smollm2 --threads 2 [--repeat 5] [--decode 24]

Prints one JSON document: medians and minima in milliseconds, peak resident memory in bytes, versions. Prefill is
one run over the whole prompt with an empty cache; decode is the mean of N single-token runs after the 37 tokens,
the caches carried over without copies (IO binding). Needs onnxruntime 1.31.1 and numpy.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime


class Decoder:
    """The export with its growing caches bound from output to input."""

    def __init__(self, folder, threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        config = json.loads((folder / "config.json").read_text())
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


def summary(values):
    return {"median_ms": round(statistics.median(values), 3), "min_ms": round(min(values), 3), "runs": len(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--decode", type=int, default=24, help="single-token runs a repeat; default %(default)s")
    arguments = parser.parse_args()
    reference = json.loads((arguments.folder / "reference.json").read_text())
    start = time.perf_counter()
    decoder = Decoder(arguments.folder, arguments.threads)
    load = (time.perf_counter() - start) * 1e3
    prompt = reference["prompt"]
    long_prompt = (prompt * 14)[:512]
    decoder.run(prompt)
    prefills, long_prefills, decodes = [], [], []
    for _ in range(arguments.repeat):
        decoder.reset()
        elapsed, logits = decoder.run(prompt)
        prefills.append(elapsed)
        assert int(logits.argmax()) == reference["greedy_tokens"][0], "wrong logits: not the model of reference.json"
        total = 0.0
        for _ in range(arguments.decode):
            elapsed, logits = decoder.run([int(logits.argmax())])
            total += elapsed
        decodes.append(total / arguments.decode)
        decoder.reset()
        long_prefills.append(decoder.run(long_prompt)[0])
    report = {
        "engine": "onnxruntime",
        "version": onnxruntime.__version__,
        "model": str(arguments.folder),
        "dtype": "fp32",
        "threads": arguments.threads,
        "load_ms": round(load, 1),
        f"prefill_{len(prompt)}": summary(prefills),
        "prefill_512": summary(long_prefills),
        "decode": summary(decodes) | {"tokens_a_run": arguments.decode},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
