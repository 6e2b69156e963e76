#!/usr/bin/env python3
"""ONNX Runtime on the CPU as a baseline, over a decoder export with growing caches (optimum's form and its kin).

    onnxruntime_baseline.py MODEL.onnx --workload WORKLOAD.json -o RESULT.json --threads 2

Caches are bound from output to input without copies (IO binding). One process, one result file (schema.py). With
--as-reference its tokens go into the workload for the systems after it, where transformers is not installed. Exit
status 2: the export or the workload is unusable.
"""

import platform
import sys
import time

import numpy as np
import onnxruntime

import schema
import stepwise
from schema import Unusable

FLOATS = {"tensor(float)": (np.float32, "fp32"), "tensor(float16)": (np.float16, "fp16")}


class Decoder:
    """The export with its growing caches bound from output to input."""

    def __init__(self, model, threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.past = {name: name.replace("past_key_values", "present") for name in inputs if name.startswith("past")}
        unknown = set(inputs) - set(self.past) - {"input_ids", "attention_mask", "position_ids"}
        missing = [name for name in ("input_ids", "attention_mask") if name not in inputs]
        missing += [name for name in ("logits", *self.past.values()) if name not in self.outputs]
        if unknown or missing or not self.past:
            raise Unusable(f"{model}: not an export with growing caches as optimum names them; unknown inputs "
                           f"{sorted(unknown)}, missing {missing}")  # fmt: skip
        first = inputs[next(iter(self.past))]
        kind, self.dtype = FLOATS[first.type]
        self.positions = "position_ids" in inputs
        self.empty = np.zeros((1, first.shape[1], 0, first.shape[3]), kind)
        self.reset()

    def reset(self):
        self.length = 0
        self.caches = {name: onnxruntime.OrtValue.ortvalue_from_numpy(self.empty) for name in self.past}

    def feed(self, ids):
        """The logits after the last of `ids`."""
        total = self.length + len(ids)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        if self.positions:
            binding.bind_cpu_input("position_ids", np.arange(self.length, total, dtype=np.int64)[None])
        for name, value in self.caches.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        results = dict(zip(self.outputs, binding.get_outputs()))
        self.caches = {name: results[present] for name, present in self.past.items()}
        self.length = total
        return results["logits"].numpy()[0, -1]

    def step(self, ids):
        """Milliseconds to the next token's id, and the id."""
        start = time.perf_counter()
        token = int(self.feed(ids).argmax())
        return (time.perf_counter() - start) * 1e3, token


def main():
    given = stepwise.parser(__doc__).parse_args()
    versions = {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    return stepwise.ended(stepwise.measure, given, Decoder, "onnxruntime", "ONNX Runtime", versions)


if __name__ == "__main__":
    sys.exit(main())
