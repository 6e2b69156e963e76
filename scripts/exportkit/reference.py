"""Decode with ONNX Runtime and write reference.json.

The recorded values are ONNX Runtime's on the file itself; torch's (no cache, so nothing shared with the exported
graph) are compared and their largest difference recorded. A file that ONNX Runtime cannot run gets torch's values.
"""

import copy
import json

import numpy as np
import onnx
import onnxruntime
import torch

from .exporters import head_dim_of, kv_heads_of
from .families import STEPS, greedy_with_torch, prompt_of


def decode(path, form, shape, prompt, steps=STEPS, optimize=True):
    """Greedy tokens and last-position logits `[steps + 1, vocabulary]`, prefill first."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_reuse = False
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    cache = {}
    for source, _ in form.pairs:
        dims = {"concat": [1, kv_heads_of(shape), 0, head_dim_of(shape)]}.get(form.kind, inputs[source].shape)
        dims = [1 if isinstance(dim, str) else dim for dim in dims]
        cache[source] = np.zeros(dims, np.float16 if "16" in inputs[source].type else np.float32)
    names = [form.logits, *(target for _, target in form.pairs)]
    ids, length, tokens, rows = list(prompt), 0, [], []
    for _ in range(steps + 1):
        positions = np.arange(length, length + len(ids), dtype=np.int64)
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, length + len(ids)), np.int64),
            "position_ids": positions[None],
            "cache_position": positions,
            "write_indices": np.array([length], np.int64),
            "nonpad_kv_seqlen": np.array([length + len(ids)], np.int64),
        }
        feed = {name: value for name, value in feed.items() if name in inputs} | cache
        logits, *present = session.run(names, feed)
        cache = dict(zip(cache, present))
        length += len(ids)
        rows.append(logits[0, -1].astype(np.float32))
        tokens.append(int(rows[-1].argmax()))
        ids = tokens[-1:]
    return tokens, np.stack(rows)


def record(folder, exporter, form, model, shape, seed):
    """Write reference.json, and return one line for the table."""
    prompt = prompt_of(shape.vocabulary)
    path = folder / "model.onnx"
    file = onnx.load(path, load_external_data=False)
    elements = {value.name: value.type.tensor_type.elem_type for value in [*file.graph.input, *file.graph.output]}
    stored = {
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
    }[elements[form.pairs[0][0]]]
    half = stored != torch.float32
    # Weights as the file has them, arithmetic in fp32.
    truth = copy.deepcopy(model).to(stored).float() if half else model
    torch_tokens, torch_rows = greedy_with_torch(truth, prompt)
    try:
        try:
            tokens, rows = decode(path, form, shape, prompt)
        except Exception:  # noqa: BLE001 - its optimizer breaks some fp16 graphs that it can run as they are
            tokens, rows = decode(path, form, shape, prompt, optimize=False)
        engine, failure = f"onnxruntime {onnxruntime.__version__}", None
    except Exception as error:  # noqa: BLE001 - what ONNX Runtime refuses is recorded, whatever it is
        tokens, rows = torch_tokens, torch_rows.numpy()
        engine, failure = f"torch {torch.__version__}", str(error).splitlines()[0][:200]
    difference = float(np.abs(rows - torch_rows.numpy()).max()) if tokens == torch_tokens else None
    reference = {
        "family": shape.family,
        "exporter": exporter,
        "dtype": {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[stored],
        "engine": engine,
        **({"onnxruntime_refuses": failure} if failure else {}),
        "torch_max_difference": None if difference is None else round(difference, 7),
        "torch_greedy_tokens": torch_tokens,
        "seed": seed,
        "model": {
            "layers": shape.layers,
            "heads": shape.heads,
            "kv_heads": kv_heads_of(shape),
            "head_dim": head_dim_of(shape),
            "hidden": shape.hidden,
            "vocabulary": shape.vocabulary,
            "window": shape.window,
            "tied": shape.tied or shape.family == "gpt2",
        },
        "cache": {"kind": form.kind, "capacity": form.capacity, "logits": form.logits, "pairs": form.pairs},
        "opset": next(entry.version for entry in file.opset_import if entry.domain in ("", "ai.onnx")),
        "prompt": prompt,
        "greedy_tokens": tokens,
        "prefill_last_logits": rounded(rows[0]),
        "step_logits": [rounded(row) for row in rows[1:]],
    }
    if half:
        reference["torch_prefill_last_logits"] = rounded(torch_rows[0])
        reference["torch_step_logits"] = [rounded(row) for row in torch_rows[1:]]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items()]
    (folder / "reference.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return reference


def rounded(row):
    return [round(float(value), 6) for value in row]
