"""Logits and greedy tokens against transformers, in fp16 and in fp32.

The reference is transformers in fp32 with the same weights. fp16 has its own error: with random weights many tokens are
nearly equal, and their order means nothing. A token other than the reference's best must be within the error of its
row; the error of transformers' own fp16 is also reported.
"""

import copy
import gc
import json

import numpy as np

from common import WORK, lab

PROMPTS = [1, 17, 128, 129, 700]
FORCED = 8
GREEDY = 24
# Through two moves of the cache: 256, 1024, 4096.
LONG = (129, 940)
BATCH = [1, 17, 128, 200]
# Of fp32 against fp32: different orders of summation.
FP32_LIMIT = 5e-4
# Of fp16 against fp32. transformers' fp16 stays below 0.007; TensorRT's attention kernel rounds scores to halves, which is an
# error of 1.2e-3 a layer where its products have none (docs/explanation/gpu.md), and adds up to this.
FP16_LIMIT = 0.04


def cases_of(vocabulary):
    generator = np.random.default_rng(7)
    draw = lambda n: generator.integers(3, vocabulary, n).tolist()
    forced = [{"prompt": draw(n), "forced": draw(FORCED)} for n in PROMPTS]
    long = [{"prompt": draw(LONG[0]), "forced": draw(LONG[1])}]
    greedy = [{"prompt": case["prompt"], "greedy": GREEDY} for case in forced]
    batch = [{"prompt": draw(n), "forced": draw(FORCED)} for n in BATCH]
    return forced + long, greedy, batch


class Truth:
    """transformers' logits after the last token of the prompt and each one after it, in one pass. `tf32` stays off."""

    def __init__(self, model):
        import torch

        torch.backends.cuda.matmul.allow_tf32 = False
        self.half = model
        self.full = model if model.dtype == torch.float32 else copy.deepcopy(model).float()

    def rows(self, model, prompt, after):
        import torch

        with torch.no_grad():
            ids = torch.tensor([prompt + after], device=model.device)
            hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1:]
            return model.lm_head(hidden).float().cpu().numpy()

    def close(self):
        import torch

        self.half = self.full = None
        gc.collect()
        torch.cuda.empty_cache()


def error(rows, truth):
    return np.linalg.norm(rows - truth, axis=1) / np.linalg.norm(truth, axis=1)


def choices(chosen, truth, spread):
    """Tokens chosen that are not the truth's best, and those of them that its margin forbids. `spread`: of single logits."""
    best = truth.argmax(1)
    at = np.arange(len(truth))
    behind = truth[at, best] - truth[at, chosen]
    other = chosen != best
    return int(other.sum()), int((other & (behind > 5 * spread)).sum())


def compare(ours, truth, prompt, after, half):
    """`half`: also compare with transformers' own fp16."""
    reference = truth.rows(truth.full, prompt, after)
    mine = error(ours, reference)
    spread = np.sqrt(np.mean((ours - reference) ** 2, axis=1))
    other, wrong = choices(ours.argmax(1), reference, spread)
    entry = {"prompt": len(prompt), "forced": len(after), "worst_relative_error": float(mine.max()),
             "mean_relative_error": float(mine.mean()), "rows": len(ours), "other_best": other, "beyond_error": wrong}
    if half:
        theirs = error(truth.rows(truth.half, prompt, after), reference)
        entry |= {"transformers_fp16_worst": float(theirs.max()), "transformers_fp16_mean": float(theirs.mean())}
        fine = mine.max() <= FP16_LIMIT
    else:
        fine = mine.max() <= FP32_LIMIT
    entry["ok"] = bool(fine and wrong == 0 and np.isfinite(ours).all())
    return entry


def run(model, package, vocabulary, with_batch=True):
    """A package of the model's own dtype against the model."""
    import torch

    half = model.dtype == torch.float16
    truth = Truth(model)
    forced, greedy, batch = cases_of(vocabulary)
    listed, rows = WORK / "cases.json", WORK / "logits.f32"
    listed.write_text(json.dumps(forced + greedy))
    record = lab("logits", package, "--cases", listed, "--output", rows)["cases"]
    ours = np.memmap(rows, np.float32, "r").reshape(-1, vocabulary)
    entries, at = [], 0
    for case, facts in zip(forced + greedy, record):
        count = 1 + len(case.get("forced", []))
        mine, at = np.array(ours[at:at + count]), at + count
        if "greedy" not in case:
            entry = compare(mine, truth, case["prompt"], case["forced"], half)
        else:
            # Every choice, given the choices before it, in the light of the truth.
            tokens = facts["best"]
            reference = truth.rows(truth.full, case["prompt"], tokens[:-1])
            spread = np.sqrt(np.mean((mine[0] - reference[0]) ** 2))
            other, wrong = choices(np.array(tokens), reference, spread)
            entry = {"prompt": len(case["prompt"]), "greedy": len(tokens), "other_best": other, "beyond_error": wrong,
                     "ok": wrong == 0}
        entries.append(entry | {key: facts[key] for key in ("chunks", "moves", "capacity")})
    out = {"dtype": "fp16" if half else "fp32", "cases": entries}
    if with_batch:
        listed.write_text(json.dumps(batch))
        lab("batch", package, "--cases", listed, "--output", rows)
        ours = np.fromfile(rows, np.float32).reshape(1 + FORCED, len(batch), vocabulary)
        out["batch"] = [compare(ours[:, i], truth, case["prompt"], case["forced"], half) for i, case in enumerate(batch)]
    rows.unlink()
    truth.close()
    out["ok"] = all(entry["ok"] for entry in out["cases"] + out.get("batch", []))
    return out
