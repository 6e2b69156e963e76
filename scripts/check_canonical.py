#!/usr/bin/env python3
"""Check a canonical graph with third-party tools: onnx.checker, then ONNX Runtime against reference.json.

    python scripts/check_canonical.py EXPORT_DIR CANONICAL.onnx [--tolerance 1e-4] [--chunk N] [--no-check] [--unoptimized]

EXPORT_DIR holds the reference.json of the export that CANONICAL.onnx (`lapidary convert --emit-onnx`) was made
from. The graph takes `input_ids` and `position_ids` `[batch, tokens]`, `write_indices` `[batch]` and
`key_cache.{i}`, `value_cache.{i}` `[batch, kv_heads, capacity, head_dim]`; it gives `logits` and
`updated_key_cache.{i}`, `updated_value_cache.{i}`. The prompt is prefilled (in pieces of N with --chunk), then the
reference's tokens are fed one by one; every row of logits is compared, and its argmax with the next token. Unwritten
cache slots have large values, so that a wrong mask is detected.

Prints one JSON line; exit status 0 when all is within the tolerance, 1 when not, 2 when the files are unusable.
Needs onnx 1.23.2, onnxruntime 1.31.1 and numpy.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

CAPACITY = 64


def log_softmax(row):
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def expected_rows(reference):
    """For each step a function from logits to the largest difference, or None where nothing was recorded."""
    if "top_logprobs" in reference:

        def against(entries):
            ids = [token for token, _ in entries]
            values = np.array([value for _, value in entries])
            return lambda row: np.abs(log_softmax(row)[ids] - values).max()

        return [against(entries) for entries in reference["top_logprobs"]]
    rows = [reference["prefill_last_logits"], *reference.get("step_logits", [])]
    compare = [lambda row, wanted=np.array(wanted): np.abs(row - wanted).max() for wanted in rows]
    return compare + [None] * (len(reference["greedy_tokens"]) - len(compare))


def first_caches(session, capacity):
    """`{input: buffer}` of every cache, filled with what must never be attended to."""
    caches = {}
    for value in session.get_inputs():
        if re.fullmatch(r"(key|value)_cache\.\d+", value.name):
            shape = [1, value.shape[1], capacity if isinstance(value.shape[2], str) else value.shape[2], value.shape[3]]
            if not all(isinstance(dim, int) for dim in shape):
                raise ValueError(f"{value.name}: kv_heads and head_dim must be numbers, found {value.shape}")
            caches[value.name] = np.full(shape, 50.0, np.float16 if "16" in value.type else np.float32)
    return caches


def run(session, reference, capacity, chunk):
    """Yield the last logits of the prefill and of each step that has a following token."""
    names = {value.name for value in session.get_inputs()}
    caches = first_caches(session, capacity)
    outputs = ["logits", *(f"updated_{name}" for name in caches)]
    prompt, tokens = reference["prompt"], reference["greedy_tokens"]
    size = chunk or len(prompt)
    pieces = [prompt[start : start + size] for start in range(0, len(prompt), size)]
    length = 0
    for index, piece in enumerate([*pieces, *([token] for token in tokens[:-1])]):
        feed = {
            "input_ids": np.array([piece], np.int64),
            "position_ids": np.arange(length, length + len(piece), dtype=np.int64)[None],
            "write_indices": np.array([length], np.int64),
        }
        feed = {name: value for name, value in feed.items() if name in names} | caches
        logits, *updated = session.run(outputs, feed)
        caches = dict(zip(caches, updated))
        length += len(piece)
        if index >= len(pieces) - 1:
            yield logits[0, -1].astype(np.float64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("export", type=Path, help="folder with reference.json, or that file")
    parser.add_argument("canonical", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit; default %(default)s")
    parser.add_argument("--chunk", type=int, help="prefill in pieces of this many tokens")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="where the graph leaves it open; default %(default)s")
    parser.add_argument("--unoptimized", action="store_true", help="without ONNX Runtime's graph optimizations")
    parser.add_argument("--no-check", action="store_true", help="leave out onnx.checker")
    arguments = parser.parse_args()
    path = arguments.export if arguments.export.is_file() else arguments.export / "reference.json"
    report = {"export": str(arguments.export), "canonical": str(arguments.canonical)}
    try:
        reference = json.loads(path.read_text())
        if not arguments.no_check:
            onnx.checker.check_model(str(arguments.canonical), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if arguments.unoptimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(arguments.canonical, options, providers=["CPUExecutionProvider"])
        compare = expected_rows(reference)
        rows = list(run(session, reference, arguments.capacity, arguments.chunk))
    except Exception as error:  # noqa: BLE001 - whatever the checker or ONNX Runtime says is the finding
        print(json.dumps(report | {"ok": False, "error": f"{type(error).__name__}: {error}"}))
        return 2
    tokens = [int(row.argmax()) for row in rows]
    differences = [None if check is None else float(check(row)) for check, row in zip(compare, rows)]
    known = [value for value in differences if value is not None]
    report |= {
        "max_difference": max(known) if np.isfinite(known).all() else None,
        "prefill_difference": differences[0],
        "step_differences": differences[1:],
        "tokens_equal": tokens == reference["greedy_tokens"],
        "tokens": tokens,
        "expected_tokens": reference["greedy_tokens"],
        "tolerance": arguments.tolerance,
    }
    within = report["max_difference"] is not None and report["max_difference"] <= arguments.tolerance
    report["ok"] = within and report["tokens_equal"]
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
