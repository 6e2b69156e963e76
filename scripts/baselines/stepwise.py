"""Common code of baselines that run an ONNX export step by step: flags, samples, outputs, the file.

A decoder gives `dtype`, `reset()`, `feed(ids)` (the row of logits after the last), `step(ids)` (milliseconds to the next
token's id on the host, and the id), and may give `load_ms`, `process` (where it runs, if not here) and `facts()`, sections of
the file that only it knows.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

import outputs
import schema
import weights_hash
from schema import Unusable

# As the other baselines: see transformers_baseline.py.
RUN = 16


def timed(decoder, ids, n):
    """Time to the first token and the gaps after it, in ms, and the tokens."""
    decoder.reset()
    first, token = decoder.step(ids)
    gaps, tokens = [], [token]
    while len(tokens) < n:
        gap, token = decoder.step(tokens[-1:])
        gaps.append(gap)
        tokens.append(token)
    return first, gaps, tokens


def outputs_of(decoder, workload, reference):
    """Greedy tokens, and logits along the reference's tokens or else its own."""
    prompts, greedy, rows = workload["prompts"], [], []
    for i, ids in enumerate(prompts):
        greedy.append(timed(decoder, ids, outputs.GREEDY)[2])
        forced = workload["forced"][i] if workload.get("forced") else greedy[-1]
        decoder.reset()
        for step in range(len(forced)):
            row = decoder.feed(ids if step == 0 else [forced[step - 1]])
            rows.append(outputs.row(i, step, row.astype(np.float32)))
    found = {"prompts": prompts, "greedy_tokens": greedy, "logits": rows, "reference": None}
    if reference:
        found["reference"] = outputs.compare(found, decoder.dtype, reference)
        schema.note("outputs", outputs.summary_line(found["reference"]))
    return found


class Refused(Exception):
    """The system does not support this export; its message is a result. `dtype`: what it would have run in, if
    known."""

    def __init__(self, words, dtype=None):
        super().__init__(words)
        self.dtype = dtype


def cpu(threads):
    return schema.host() | {"copy_bandwidth_bytes_per_s": schema.cpu_copy_bandwidth(threads), "peak_flops": None}


def config_of(folder):
    """The sizes of a model as its Hugging Face config names them; this repository's small fixtures have them elsewhere."""
    if (folder / "config.json").is_file():
        return json.loads((folder / "config.json").read_text())
    if not (folder / "reference.json").is_file():
        raise Unusable(f"{folder}: no config.json beside the export")
    names = {"num_hidden_layers": "layers", "hidden_size": "hidden", "num_attention_heads": "heads",
             "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "vocab_size": "vocabulary"}  # fmt: skip
    sizes = json.loads((folder / "reference.json").read_text())["model"]
    return {name: sizes[ours] for name, ours in names.items()}


def measure(given, open_decoder, name, variant, version_facts, machine=cpu, settings=None, checkpoint=None):
    """The whole of a baseline. `open_decoder(model, threads)` is timed as the load; `checkpoint` is the Hugging Face folder that
    the model was made of, where it has weights in another form."""
    workload = outputs.read_workload(given.workload)
    config = config_of(checkpoint or given.model.parent)
    known = weights_hash.of_file(checkpoint or given.model)
    if given.weights_hash and known["hash"] != given.weights_hash:
        raise Unusable(f"{given.model}: its weights hash to {known['hash']}, not {given.weights_hash}")
    reference = outputs.reference_of(given.reference, known["hash"]) if given.reference else None
    start = time.perf_counter()
    try:
        decoder = open_decoder(given.model, given.threads)
    except Refused as refused:
        schema.failed(given.output, name, variant, given.label or variant, str(refused), settings, given.reference, refused.dtype)
        return 0
    # A decoder in a separate process has timed itself.
    load_ms = getattr(decoder, "load_ms", (time.perf_counter() - start) * 1e3)
    model = schema.Model(given.model_name or given.model.parent.name, config, known["parameters"], known["tied"],
                         decoder.dtype, known["hash"])  # fmt: skip
    label = given.label or f"{variant} {decoder.dtype}"
    settings = settings or {"threads": given.threads}
    result = schema.Document(given.output, name, variant, label, model, machine(given.threads), version_facts,
                             outputs.identities(workload), workload["seed"], settings,
                             getattr(decoder, "process", "self"))  # fmt: skip
    result.loaded(load_ms)
    timed(decoder, outputs.timed(workload, min(16, len(workload["timed"]))), 8)
    if given.outputs:
        result["outputs"] = outputs_of(decoder, workload, reference)
    if given.as_reference:
        schema.write(given.workload, workload | {"forced": result.values["outputs"]["greedy_tokens"]})
    for tokens in given.prefill:
        ids = outputs.timed(workload, tokens)
        result.prefill(tokens, [timed(decoder, ids, 1)[0] for _ in range(given.prefill_samples + 1)][1:])
    for live in given.live:
        ids, samples = outputs.timed(workload, live), []
        # One-time costs of a process for each length are not part of a step.
        timed(decoder, ids, RUN + 1)
        for _ in range(max(1, given.decode_samples // RUN)):
            samples += timed(decoder, ids, RUN + 1)[1]
        result.decode(live, None, samples)
    for prompt, new in given.end_to_end:
        ids = outputs.timed(workload, prompt)
        timed(decoder, ids, new)
        result.end_to_end(prompt, new, [timed(decoder, ids, new)[:2] for _ in range(given.runs)])
    for section, facts in (decoder.facts() if hasattr(decoder, "facts") else {}).items():
        result.values[section] |= facts
    result.finish()
    return 0


def parser(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a decoder export with growing caches")
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
    return parser


def ended(function, *arguments):
    """The exit status of a baseline."""
    try:
        return function(*arguments)
    except (Unusable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
