#!/usr/bin/env python3
"""ONNX Runtime on the CPU as a baseline, over a decoder export with growing caches (optimum's form and its kin).

    onnxruntime_baseline.py MODEL.onnx --workload WORKLOAD.json -o RESULT.json --threads 2

Caches are bound from output to input without copies (IO binding). One process, one result file (schema.py). With
--as-reference its tokens go into the workload for the systems after it, where transformers is not installed. Exit
status 2: the export or the workload is unusable.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

import outputs
import schema
import weights_hash
from schema import Unusable

# As the other baselines: see transformers_baseline.py.
RUN = 16
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

    def timed(self, ids, n):
        """Time to the first token and the gaps after it."""
        self.reset()
        first, token = self.step(ids)
        gaps, tokens = [], [token]
        while len(tokens) < n:
            gap, token = self.step(tokens[-1:])
            gaps.append(gap)
            tokens.append(token)
        return first, gaps, tokens


def outputs_of(decoder, workload, reference):
    """Greedy tokens, and logits along the reference's tokens or else its own."""
    prompts, greedy, rows = workload["prompts"], [], []
    for i, ids in enumerate(prompts):
        greedy.append(decoder.timed(ids, outputs.GREEDY)[2])
        forced = workload["forced"][i] if workload.get("forced") else greedy[-1]
        decoder.reset()
        for step in range(len(forced)):
            row = decoder.feed(ids if step == 0 else [forced[step - 1]])
            rows.append(outputs.row(i, step, row.astype(np.float32)))
    found = {"prompts": prompts, "greedy_tokens": greedy, "logits": rows, "reference": None}
    if reference:
        found["reference"] = outputs.compare(found, decoder.dtype, json.loads(reference.read_text()))
        schema.note("outputs", outputs.told(found["reference"]))
    return found


def run(given):
    workload = outputs.read_workload(given.workload)
    config = json.loads((given.model.parent / "config.json").read_text())
    known = weights_hash.of_file(given.model)
    if given.weights_hash and known["hash"] != given.weights_hash:
        raise Unusable(f"{given.model}: its weights hash to {known['hash']}, not {given.weights_hash}")
    start = time.perf_counter()
    decoder = Decoder(given.model, given.threads)
    load_ms = (time.perf_counter() - start) * 1e3
    model = schema.Model(given.model_name or given.model.parent.name, config, known["parameters"], known["tied"],
                         decoder.dtype, known["hash"])  # fmt: skip
    machine = schema.host() | {"copy_bandwidth_bytes_per_s": schema.cpu_copy_bandwidth(given.threads)}
    versions = {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    label = given.label or f"ONNX Runtime {decoder.dtype}"
    result = schema.Document(given.output, "onnxruntime", "CPU, IO binding", label, model, machine, versions,
                             outputs.identities(workload), workload["seed"], {"threads": given.threads})  # fmt: skip
    result.values["load"]["load_ms"] = load_ms
    decoder.timed(outputs.timed(workload, 16), 8)
    if given.outputs:
        result["outputs"] = outputs_of(decoder, workload, given.reference)
    if given.as_reference:
        schema.write(given.workload, workload | {"forced": result.values["outputs"]["greedy_tokens"]})
    for tokens in given.prefill:
        ids = outputs.timed(workload, tokens)
        result.prefill(tokens, [decoder.timed(ids, 1)[0] for _ in range(given.prefill_samples + 1)][1:])
    for live in given.live:
        ids, samples = outputs.timed(workload, live), []
        for _ in range(max(1, given.decode_samples // RUN)):
            samples += decoder.timed(ids, RUN + 1)[1]
        result.decode(live, None, samples)
    for prompt, new in given.end_to_end:
        ids = outputs.timed(workload, prompt)
        result.end_to_end(prompt, new, [decoder.timed(ids, new)[:2] for _ in range(given.runs)])
    result.write()
    return 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--model-name", help="in the result; default: the folder's")
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="the fp32 reference's result; without it outputs are not compared")
    parser.add_argument("--as-reference", action="store_true", help="write the tokens it chose into the workload")
    parser.add_argument("--weights-hash", help="refuse other weights")
    parser.add_argument("--outputs", type=int, default=1, choices=[0, 1], help="0: times only")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--label", help="in tables")
    parser.add_argument("--prefill", type=schema.numbers, default=[128, 512], metavar="N,N")
    parser.add_argument("--live", type=schema.numbers, default=[300], metavar="N,N")
    parser.add_argument("--end-to-end", type=schema.pairs, default=[(128, 128)], metavar="PROMPT:NEW,…")
    parser.add_argument("--runs", type=int, default=4, help="end to end")
    parser.add_argument("--prefill-samples", type=int, default=8)
    parser.add_argument("--decode-samples", type=int, default=64)
    return parser.parse_args()


def main():
    try:
        return run(arguments())
    except (Unusable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
