#!/usr/bin/env python3
"""Held-out exports: families and options that were not used while the passes were written, with ONNX Runtime's answers.

    export/bin/python scripts/held_out_families.py make /work/held-out optimum
    t5/bin/python scripts/held_out_families.py make /work/held-out dynamo torchscript genai mobius
    python scripts/held_out_families.py check target/release/lapidary /work/held-out

`make` writes the cases of these exporters and of a round of held_out_cases.py (`--round`): folders of model.onnx, config.json and reference.json as in fixtures/families
(ONNX Runtime at basic optimizations; a short prompt and one that is longer than every window). The environments are those
of make_fixtures.py; a case of another version of transformers is made where that is installed, with the optimum of its time.
`check` converts each and compares 20 log-probabilities of each step. `--only TEXT`: cases with TEXT in
their names. docs/contributing/held-out-exports.md has what the rounds found.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

from held_out_cases import ROUNDS, VOCABULARY

STEPS, BEST = 6, 20
LIMITS = {"fp32": 3e-3, "fp16": 5e-2}


# --- making ----------------------------------------------------------------------------------------------------


def build(kind, settings, eager=False):
    """A model with weights that spread, and the same on every run."""
    import torch
    import transformers
    from exportkit.families import spread_weights

    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, **({"attn_implementation": "eager"} if eager else {})).float().eval()
    if hasattr(model, "set_experts_implementation"):
        # The loop over experts, transformers 5's own, is refused by the exporter.
        with contextlib.suppress(Exception):
            model.set_experts_implementation("batched_mm")
    spread_weights(model, 5, 1.1)
    return model


def save_checkpoint(model, folder):
    from exportkit.families import Shape, save

    save(model, Shape("", vocabulary=VOCABULARY), folder)


def parts_of(cache):
    """Keys and values of each layer in turn; transformers 4.48 has them in two lists."""
    if isinstance(cache, tuple):
        return [part for pair in cache for part in pair]
    if hasattr(cache, "key_cache"):
        return [part for pair in zip(cache.key_cache, cache.value_cache) for part in pair]
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def flat(model, positions, last=False):
    import inspect

    import torch
    from transformers import cache_utils

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.m = model
            self.takes_positions = positions and "position_ids" in inspect.signature(model.forward).parameters

        def forward(self, input_ids, attention_mask, position_ids, past):
            cache = cache_utils.DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            given = {"position_ids": position_ids} if self.takes_positions else {}
            given |= {"logits_to_keep": 1} if last else {}
            result = self.m(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given)
            return (result.logits, *parts_of(result.past_key_values))

    class WithoutPositions(Flat):
        def forward(self, input_ids, attention_mask, past):
            return super().forward(input_ids, attention_mask, None, past)

    return (Flat() if positions else WithoutPositions()).eval()


def torch_export(model, folder, opset, script, batch=None, positions=True, axes=(), dtype="fp32", last=False):
    import torch

    axes = dict(axes)
    dims = {name: axes.get(name, name) for name in ("batch", "sequence_length", "past_length", "total_length")}
    model = model.half() if dtype == "fp16" else model
    rows = batch or 2
    with torch.no_grad():
        cached = model(input_ids=torch.ones(rows, 4, dtype=torch.int64), use_cache=True).past_key_values
    past = [torch.randn(part.shape[:2] + (5,) + part.shape[3:], dtype=part.dtype) for part in parts_of(cached)]
    caches = [f"past_key_values.{i}.{part}" for i in range(len(past) // 2) for part in ("key", "value")]
    ids, mask, places = torch.ones(rows, 3, dtype=torch.int64), torch.ones(rows, 8, dtype=torch.int64), torch.arange(5, 8).expand(rows, 3).contiguous()
    free = {} if batch else {0: dims["batch"]}
    by_token, by_total = {**free, 1: dims["sequence_length"]}, {**free, 1: dims["total_length"]}
    example = (ids, mask, places, past) if positions else (ids, mask, past)
    names = ["input_ids", "attention_mask", *(["position_ids"] if positions else []), *caches]
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in caches)]
    wrapped = flat(model, positions, last)
    if script:
        given = {"input_ids": by_token, "attention_mask": by_total, "position_ids": by_token, "logits": by_token}
        given = {name: value for name, value in given.items() if name in [*names, *outputs]}
        given |= {name: {**free, 2: dims["past_length"]} for name in caches}
        given |= {name: {**free, 2: dims["total_length"]} for name in outputs[1:]}
        if last:
            given["logits"] = free
        folder.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(wrapped, example, folder / "model.onnx", dynamo=False, opset_version=opset, input_names=names, output_names=outputs, dynamic_axes=given)
        return
    shapes = [by_token, by_total, *([by_token] if positions else []), [{**free, 2: dims["past_length"]} for _ in caches]]
    from exportkit.exporters import save_dynamo

    program = torch.onnx.export(wrapped, example, dynamo=True, opset_version=opset, verbose=False, input_names=names, output_names=outputs, dynamic_shapes=tuple(shapes))
    save_dynamo(program, folder)


def by_optimum(model, folder, opset, legacy=False):
    import torch

    # Older versions know one exporter, which newer versions of torch ask for by name, and whose parts have moved.
    from torch.onnx import symbolic_opset14
    from torch.onnx._internal.torchscript_exporter import symbolic_opset14 as moved

    for name in vars(moved):
        if not hasattr(symbolic_opset14, name):
            setattr(symbolic_opset14, name, getattr(moved, name))
    from optimum.exporters.onnx import main_export

    export = torch.onnx.export
    torch.onnx.export = lambda *args, **given: export(*args, **{"dynamo": False, **given})
    more = {"legacy": True} if legacy else {}

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, built = Path(scratch) / "checkpoint", Path(scratch) / "built"
        save_checkpoint(model, checkpoint)
        main_export(str(checkpoint), output=str(built), task="text-generation-with-past", do_validation=False, opset=opset, **more)
        torch.onnx.export = export
        folder.mkdir(parents=True, exist_ok=True)
        names = ["model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx"]
        name = next(name for name in names if (built / name).exists())
        shutil.copy(built / name, folder / "model.onnx")


def by_builder(model, folder, command, extra):
    """ORT-GenAI's builder or mobius, both of which read a checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, built = Path(scratch) / "checkpoint", Path(scratch) / "built"
        save_checkpoint(model, checkpoint)
        if command == "genai":
            words = ["onnxruntime_genai.models.builder", "-i", "checkpoint", "-o", str(built), "-p", "fp32", "-e", "cpu", "-c", str(Path(scratch) / "c")]
            words += ["--extra_options", *extra] if extra else []
        else:
            words = ["mobius", "build", "--config", "checkpoint", *extra, str(built)]
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=scratch)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        folder.mkdir(parents=True, exist_ok=True)
        for path in built.glob("model.onnx*"):
            shutil.copy(path, folder)


def references(path, kv_heads, head_dim):
    """Greedy tokens and best log-probabilities, as ONNX Runtime computes them from that file."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    outputs = [value.name for value in session.get_outputs()]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    caches = [value for value in inputs if value.name.startswith("past_key_values")]
    runs = []
    for count, step in ((11, 29), (35, 31)):
        prompt = [1] + [(17 + step * i) % (VOCABULARY - 4) + 3 for i in range(count - 1)]
        ids, length, tokens, top = list(prompt), 0, [], []
        cache = {}
        for value in caches:
            # One sequence, nothing kept; heads and their elements by name in ORT-GenAI's exports.
            merged = any(value.name == "use_cache_branch" for value in inputs)
            free = {0: 1, 1: kv_heads, 2: 1 if merged else 0, 3: head_dim}
            dims = [dim if isinstance(dim, int) else free[axis] for axis, dim in enumerate(value.shape)]
            cache[value.name] = np.zeros(dims, types[value.type])
        batch = next(iter(cache.values())).shape[0] if cache else 1
        for _ in range(STEPS):
            total = length + len(ids)
            feed = {"input_ids": np.array([ids] * batch, np.int64), "attention_mask": np.ones((batch, total), np.int64), "position_ids": np.arange(length, total, dtype=np.int64)[None].repeat(batch, 0)}
            feed["use_cache_branch"] = np.array([length > 0])
            feed = {value.name: feed[value.name] for value in inputs if value.name in feed} | cache
            found = dict(zip(outputs, session.run(None, feed)))
            cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
            length = total
            row = found["logits"][0, -1].astype(np.float64)
            row -= row.max() + np.log(np.exp(row - row.max()).sum())
            best = np.argsort(-row, kind="stable")[:BEST]
            top.append([[int(token), round(float(row[token]), 6)] for token in best])
            ids = [int(best[0])]
            tokens += ids
        runs.append({"prompt": prompt, "tokens": tokens, "top": top})
    return runs


def truth(model, runs):
    """The same steps by transformers in fp32 arithmetic: the largest difference from ONNX Runtime's."""
    import torch

    worst = 0.0
    model = model.float()
    for run in runs:
        ids = list(run["prompt"])
        for token, top in zip(run["tokens"], run["top"]):
            with torch.no_grad():
                row = torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double(), -1)
            worst = max(worst, *(abs(float(row[t]) - value) for t, value in top))
            ids.append(token)
    return worst


def make(target, exporters, only, cases):
    import transformers

    for exporter, name, kind, settings, options in cases:
        label = f"{exporter}-{name}"
        tool, opset = exporter.rstrip("0123456789"), exporter.lstrip("abcdefghijklmnopqrstuvwxyz")
        version = options.get("transformers", "4.57" if tool == "optimum" else "5.")
        if tool not in exporters or only not in label or not transformers.__version__.startswith(version):
            continue
        folder = target / label
        shutil.rmtree(folder, ignore_errors=True)
        try:
            given = {name: value for name, value in options.items() if name not in ("reference", "transformers", "eager")}
            model = build(kind, settings, options.get("eager", False))
            if tool == "optimum":
                by_optimum(model, folder, int(opset), **given)
            elif tool in ("genai", "mobius"):
                by_builder(model, folder, tool, given.get("extra", []))
            else:
                torch_export(model, folder, int(opset), tool == "torchscript", **given)
            model.config.save_pretrained(folder)
            if not options.get("reference", True):
                print(f"{label}: made, no reference", file=sys.stderr, flush=True)
                continue
            heads = getattr(model.config, "num_attention_heads", 1)
            width = getattr(model.config, "head_dim", None) or getattr(model.config, "hidden_size", 1) // heads
            runs = references(folder / "model.onnx", getattr(model.config, "num_key_value_heads", None) or heads, width)
            difference = truth(model, runs)
        except Exception as error:  # noqa: BLE001 - an exporter that refuses a family is a finding, not the end
            if os.environ.get("TRACE"):
                traceback.print_exc(limit=-4)
            if not (folder / "model.onnx").exists():
                shutil.rmtree(folder, ignore_errors=True)
            print(f"{label}: FAILED {type(error).__name__}: {(str(error).strip() or '?').splitlines()[-1][:200]}", file=sys.stderr, flush=True)
            continue
        (folder / "reference.json").write_text("[\n" + ",\n".join(" " + json.dumps(run) for run in runs) + "\n]\n")
        print(f"{label}: {(folder / 'model.onnx').stat().st_size // 1024} KiB, transformers {difference:.1e} away", file=sys.stderr, flush=True)


# --- checking --------------------------------------------------------------------------------------------------


def compare(binary, folder):
    """`ok` with the largest difference, `refused` with the message, or `WRONG`."""

    def run(*words):
        return subprocess.run([str(word) for word in words], capture_output=True, text=True, env=os.environ | {"RUST_BACKTRACE": "0"})

    limit = LIMITS["fp16" if "fp16" in folder.name else "fp32"]
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package"
        done = run(binary, "convert", folder / "model.onnx", "-o", package, "--target", "cpu", "--capacity", 64)
        if done.returncode:
            return {"result": "refused", "exit": done.returncode, "message": done.stderr.strip()}
        if not (folder / "reference.json").exists():
            return {"result": "converted, without a reference"}
        worst = 0.0
        for case in json.loads((folder / "reference.json").read_text()):
            done = run(
                *(binary, "generate", package, "--prompt-ids", ",".join(map(str, case["prompt"])), "--temperature", 0, "--json"),
                *("--max-new-tokens", STEPS, "--ignore-eos", "--logprobs", BEST, "--device", "cpu"),
            )
            if done.returncode:
                return {"result": "WRONG", "message": done.stderr.strip()}
            for step, top, token in zip(json.loads(done.stdout)["steps"], case["top"], case["tokens"]):
                expected = dict(map(tuple, top))
                worst = max(worst, *(abs(value - expected[t]) for t, value in step["top_logprobs"] if t in expected))
                if step["token"] != token:
                    # Another token is right only between two that are equally good.
                    worst = max(worst, top[0][1] - expected.get(step["token"], -1e9))
                    break
        return {"result": "ok" if worst <= limit else "WRONG", "worst": worst}


def check(binary, target, only, file):
    findings = {}
    for model in sorted(target.glob("*/model.onnx")):
        label = model.parent.name
        if only not in label:
            continue
        findings[label] = compare(binary.resolve(), model.parent)
        shown = findings[label].get("message", f"{findings[label].get('worst', 0):.1e}")
        print(f"{findings[label]['result']:8} {label}  {' '.join(shown.split())[:600]}", flush=True)
    right = sum(finding["result"] == "ok" for finding in findings.values())
    print(f"{right} of {len(findings)} agree")
    if file:
        file.write_text(json.dumps(findings, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make")
    making.add_argument("target", type=Path)
    making.add_argument("--round", default="second", choices=list(ROUNDS))
    making.add_argument("exporter", nargs="+", help="optimum, dynamo, torchscript, genai, mobius")
    checking = actions.add_parser("check")
    checking.add_argument("binary", type=Path)
    checking.add_argument("target", type=Path)
    checking.add_argument("--json", type=Path, help="write the findings here")
    for action in (making, checking):
        action.add_argument("--only", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.target, arguments.exporter, arguments.only, ROUNDS[arguments.round])
    else:
        check(arguments.binary, arguments.target, arguments.only, arguments.json)


if __name__ == "__main__":
    main()
