#!/usr/bin/env python3
"""Decoders that take embeddings on the GPU, in every weight mode: prompts as ids and as rows, against the CPU executor
on the same package and against the recorded tokens of the export.

The decoders are small exports of fixtures with their embedding taken out, and those that pack.sh took along from .gpu/embeddings:
a folder each with model.onnx, whose unread `model.embed_tokens.weight` is the table, and reference.json, a list of prompts
and tokens. Tokens may part where the CPU's two best are closer than the limit.

    python3 embeddings.py FOLDER          # only takes the exports apart; needs neither GPU nor Lapidary
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from common import BIN, ROOT, WORK, lapidary, run
from quantized import PARTS, agreement, all_of
from tiny import MODES, generate

FIXTURES = ["exports/qwen3-optimum", "exports/qwen2-optimum", "exports/llama-optimum-fp16", "exports/llama-ort-genai",
            "exports/llama-dynamo-static", "exports/llama-mobius-static", "experts/optimum-qwen3moe", "families/optimum-bloom",
            "families/optimum-deepseek-v3", "families/optimum-gemma3", "families/optimum-gpt-oss", "families/optimum-gptneox",
            "families/optimum-phi3-longrope"]  # fmt: skip
# These with every mode and with prompts of all lengths, the others briefly.
THOROUGH = ["exports-qwen3-optimum", "shape_embeds"]
ALL_MODES = ["bind", "embed", "strip-general", "strip-identical", "bind-fp16", "embed-fp16", "bind-dynamic", "bind-one-engine"]
# Around the chunks of 4 and 16, and one row.
LENGTHS, FEW_LENGTHS = (1, 3, 4, 5, 16, 17, 21, 38), (3, 21, 38)
TOKENS = 20


def take_apart(export, folder):
    """Writes the export without its embedding, with the input `inputs_embeds`, and table.npy; copies reference.json."""
    model = onnx.load(export / "model.onnx")
    graph, weights = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = {value.name: value for value in graph.input}
    if "inputs_embeds" in inputs:
        table = "model.embed_tokens.weight"
    else:
        readers = [node for node in graph.node if "input_ids" in node.input]
        if len(readers) != 1 or readers[0].op_type != "Gather" or readers[0].input[0] not in weights:
            raise ValueError(f"{export}: input_ids is read by {[node.op_type for node in readers]}, not by one Gather of a weight")
        lookup, table = readers[0], readers[0].input[0]
        for node in graph.node:
            for i, name in enumerate(node.input):
                if name == lookup.output[0]:
                    node.input[i] = "inputs_embeds"
        graph.node.remove(lookup)
        ids, width = inputs["input_ids"], weights[table].dims[1]
        shape = [dim.dim_param or dim.dim_value for dim in ids.type.tensor_type.shape.dim]
        ids.CopyFrom(helper.make_tensor_value_info("inputs_embeds", weights[table].data_type, [*shape, width]))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "table.npy", numpy_helper.to_array(weights[table]))
    if not any(table in node.input for node in graph.node):
        graph.initializer.remove(weights[table])
    onnx.save(model, folder / "model.onnx")
    for name in ("config.json", "reference.json"):
        if (export / name).exists():
            shutil.copy(export / name, folder / name)


def decoders(folder):
    """The folders of all decoders, made in `folder`; those with more cases first."""
    exports = {name.replace("/", "-"): ROOT / "fixtures" / name for name in FIXTURES}
    exports |= {path.parent.name: path.parent for path in sorted((PARTS / "embeddings").glob("*/model.onnx"))}
    for name, export in exports.items():
        take_apart(export, folder / name)
    return sorted((folder / name for name in exports), key=lambda made: (made.name not in THOROUGH, made.name))


def jobs(made):
    for folder in made:
        for mode in ALL_MODES if folder.name in THOROUGH else ["bind", "embed", "bind-fp16"]:
            yield f"{folder.name} {mode}", folder, mode


def check(name, folder, mode):
    package = WORK / "embeddings" / name.replace(" ", "-")
    rows = package.with_suffix(".npy")
    table = np.load(folder / "table.npy")
    chunks = [] if "--prefill" in MODES[mode] else ["--prefill", "4,16"]
    flags = ["--capacity", "16,32,64", *chunks, *MODES[mode], "--embeddings", folder / "table.npy", "--target", "tensorrt-rtx"]
    lapidary("convert", folder / "model.onnx", "-o", package, "--force", *flags)
    half = "fp16" in name
    limit, runs = 0.05 if half else 2e-3, {}
    for length in LENGTHS if folder.name in THOROUGH else FEW_LENGTHS:
        ids = [(17 + 29 * i) % (len(table) - 3) + 3 for i in range(length)]
        ids = [1, *ids[1:]] if length > 1 else ids
        cpu = generate(package, ids, TOKENS, "cpu")
        runs[f"{length} ids"] = agreement(generate(package, ids, TOKENS, "cuda"), cpu, limit)
        # A batch of one and plain rows are the same prompt.
        np.save(rows, table[ids][None] if length % 2 else table[ids])
        runs[f"{length} rows"] = agreement(generate(package, rows, TOKENS, "cuda"), cpu, limit)
        runs[f"{length} rows, CPU"] = agreement(generate(package, rows, TOKENS, "cpu"), cpu, limit)
    # Rows that are no token's, in fp16 whatever the package has.
    size = np.float16(np.abs(table.astype(np.float32)).mean())
    np.save(rows, np.random.default_rng(3).standard_normal((23, table.shape[1])).astype(np.float16) * size)
    runs["23 other rows"] = agreement(*(generate(package, rows, TOKENS, device) for device in ("cuda", "cpu")), limit)
    for prompt, tokens in [] if half else references(folder):
        runs[f"{len(prompt)} ids, reference"] = {"ok": generate(package, prompt, len(tokens), "cuda")["tokens"] == tokens}
    shutil.rmtree(package)
    worst = max(result.get("worst_logprob", 0) for result in runs.values())
    return {"ok": all(result["ok"] for result in runs.values()), "worst_logprob": worst, "runs": runs}


def references(folder):
    """Prompts and greedy tokens that were recorded of the export: of fixtures one pair, of others a list."""
    file = folder / "reference.json"
    recorded = json.loads(file.read_text()) if file.exists() else []
    recorded = recorded if isinstance(recorded, list) else [recorded]
    return [(case["prompt"], case.get("tokens") or case["greedy_tokens"]) for case in recorded]


def without_table(folder):
    """A package that has no table: one token follows a prompt of rows; more tokens, and a prompt of ids, are refused."""
    package, rows = WORK / "embeddings" / "no-table", WORK / "embeddings" / "no-table.npy"
    lapidary("convert", folder / "model.onnx", "-o", package, "--force", "--capacity", 32, "--prefill", "4,16", "--target", "tensorrt-rtx")
    np.save(rows, np.load(folder / "table.npy")[[1, 20, 33, 47, 12, 7, 25, 90, 18, 64, 5]])
    one = agreement(*(generate(package, rows, 1, device) for device in ("cuda", "cpu")), 2e-3)
    refused = {}
    for what, given in (("two tokens", ["--prompt-embeds", rows]), ("ids", ["--prompt-ids", "1,2"])):
        done = run(BIN / "lapidary", "generate", package, *given, "--max-new-tokens", 2, "--device", "cuda", check=False)
        message = next((line for line in done.stderr.splitlines() if line.startswith("error:")), "")
        refused[what] = {"status": done.returncode, "message": message}
    shutil.rmtree(package)
    right = one["ok"] and all(each["status"] == 2 and "no table" in each["message"] for each in refused.values())
    return {"ok": right, "one token": one, "refused": refused}


def stage(results, seconds=400):
    made = decoders(WORK / "embeddings" / "exports")
    results.attempt("without_table", without_table, made[0])
    only = os.environ.get("EMBEDDINGS", "")
    results.attempt("embeddings", all_of, jobs(made), check, "packages of decoders of embeddings", only, seconds)


if __name__ == "__main__":
    for made in decoders(Path(sys.argv[1])):
        print(made)
