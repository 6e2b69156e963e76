"""The prompts of every system, its outputs, and their distance from the reference.

A workload file holds the ids that speed is measured with, prompts for comparing outputs and, once the fp32 reference has
run, the tokens it chose after each: `{"seed", "timed": [id], "prompts": [[id]], "forced": [[id]]}`. Each system writes its own
greedy tokens and the logits along the reference's tokens, where every system has the same context; both are compared
before any times are used.
"""

import hashlib
import json
import math
import struct
from pathlib import Path

from schema import Unusable

GREEDY = 32
TOP = 32
# Relative error of the logits (see `compare`) up to which outputs count as equal.
LIMITS = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.2}
# A difference of two logits is within the error if it is below this many root mean squares of the error of one: of all
# rows, or of its own row where that is larger, since errors grow with the context. The two compared logits are left out of
# their row's, so one that is far off among good ones does not excuse itself.
CLEAR = 4.0


def made_workload(lengths, timed, vocabulary, seed, low=3):
    """Random ids, for models with random weights."""
    import numpy as np

    draw = np.random.default_rng(seed)
    ids = lambda n: draw.integers(low, vocabulary, n).tolist()
    return {"seed": seed, "timed": ids(timed), "prompts": [ids(n) for n in lengths]}


def text_workload(lengths, timed, ids):
    """Real text, repeated to the requested length."""
    repeated = lambda n: (ids * (n // len(ids) + 1))[:n]
    return {"seed": 0, "timed": repeated(timed), "prompts": [repeated(n) for n in lengths]}


def read_workload(path):
    path = Path(path)
    if not path.is_file():
        raise Unusable(f"{path}: no such file; scripts/baselines/workload.py makes one")
    workload = json.loads(path.read_text())
    if not workload.get("prompts") or not all(workload["prompts"]) or not workload.get("timed"):
        raise Unusable(f"{path}: has no prompts, or an empty one")
    return workload


def timed(workload, n):
    """The first `n` ids of the prompt that speed is measured with."""
    if len(workload["timed"]) < n:
        raise Unusable(f"the workload's timed prompt has {len(workload['timed'])} tokens, but {n} are required")
    return workload["timed"][:n]


def identities(workload):
    """A result file's description of the prompts."""
    return [identity(ids) for ids in (workload["timed"], *workload["prompts"])]


def identity(ids):
    """A prompt in a result file: its length and the SHA-256 of its ids as little-endian 32-bit numbers."""
    return {"tokens": len(ids), "sha256": hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()}


def row(prompt, step, logits):
    """A row of logits (a numpy vector) in a result file's form."""
    import numpy as np

    logits = np.asarray(logits, np.float32)
    if not np.isfinite(logits).all():
        raise ValueError(f"logits of prompt {prompt}, step {step} are not all finite")
    best = np.argpartition(-logits, TOP)[:TOP] if len(logits) > TOP else np.arange(len(logits))
    best = best[np.argsort(-logits[best], kind="stable")]
    top = [[int(i), round(float(logits[i]), 5)] for i in best]
    norm = float(np.linalg.norm(logits.astype(np.float64)))
    return {"prompt": prompt, "step": step, "top": top, "norm": round(norm, 5), "margin": round(top[0][1] - top[1][1], 5)}


def reference_of(path, weights_hash):
    """The reference's document, if it has the same weights."""
    reference = json.loads(Path(path).read_text())
    theirs = reference["model"]["weights_hash"]
    if theirs != weights_hash:
        raise Unusable(f"{path}: its weights ({theirs[:12]}…) are not those that were run ({weights_hash[:12]}…)")
    return reference


def compare(outputs, dtype, reference):
    """What `outputs.reference` says: errors of the logits over the ids that the reference ranks highest, greedy tokens.

    The error of a row is the norm of the difference over the norm of the reference, both over the shared top ids.
    """
    if outputs["prompts"] != reference["outputs"]["prompts"]:
        raise Unusable("the reference was made with other prompts")
    theirs = {(r["prompt"], r["step"]): r for r in reference["outputs"]["logits"]}
    errors, squares, count, differing, of_row = [], 0.0, 0, [], {}
    for mine in outputs["logits"]:
        other = theirs.get((mine["prompt"], mine["step"]))
        if other is None:
            continue
        ours, expected = dict(map(tuple, mine["top"])), dict(map(tuple, other["top"]))
        shared = [i for i in expected if i in ours]
        if len(shared) < len(expected) // 4:
            errors.append(1.0)
            continue
        difference = math.fsum((ours[i] - expected[i]) ** 2 for i in shared)
        errors.append(math.sqrt(difference / math.fsum(expected[i] ** 2 for i in shared)))
        squares, count = squares + difference, count + len(shared)
        first, second = mine["top"][0][0], other["top"][0][0]
        others = [(ours[i] - expected[i]) ** 2 for i in shared if i not in (first, second)]
        of_row[mine["prompt"], mine["step"]] = math.sqrt(math.fsum(others) / max(1, len(others)))
        if first != second:
            differing.append((mine["prompt"], mine["step"]))
    if not errors:
        raise Unusable("no row of logits is in both the result and the reference")
    noise = math.sqrt(squares / max(1, count))
    within = lambda row: row in theirs and theirs[row]["margin"] < CLEAR * max(noise, of_row.get(row, 0.0))
    equal, differences = [], []
    for i, (mine, other) in enumerate(zip(outputs["greedy_tokens"], reference["outputs"]["greedy_tokens"])):
        n = min(len(mine), len(other))
        same = next((k for k in range(n) if mine[k] != other[k]), n)
        equal.append(same)
        margin = theirs[i, same]["margin"] if same < n and (i, same) in theirs else None
        found = {"step": same, "margin": margin, "within_error": within((i, same))}
        differences.append(None if same == n else found)
    limit, clear = LIMITS[dtype], sum(not within(row) for row in differing)
    return {
        "system": f"{reference['system']['name']} {reference['model']['dtype']}",
        "worst_relative_logit_error": max(errors),
        "mean_relative_logit_error": math.fsum(errors) / len(errors),
        "rms_logit_error": noise,
        "limit": limit,
        "rows": len(errors),
        "same_best": len(errors) - len(differing),
        "differing_within_error": len(differing) - clear,
        "differing_though_clear": clear,
        "greedy_equal_up_to": equal,
        "first_difference": differences,
        "equal": max(errors) <= limit and clear == 0 and all(d is None or d["within_error"] for d in differences),
    }  # fmt: skip


def summary_line(found):
    """One line for a person."""
    verdict = "equal within the limit" if found["equal"] else "NOT EQUAL"
    return (f"{verdict}: worst logit error {found['worst_relative_logit_error']:.2g} (limit {found['limit']:g}), same best "
            f"token in {found['same_best']} of {found['rows']} rows, greedy equal up to {found['greedy_equal_up_to']}")  # fmt: skip
