#!/usr/bin/env python3
"""Effect of fp16 (bf16 for families whose name ends with it) on tiny models of some families, measured with transformers only:
differences of log-probabilities.

    t5/bin/python scripts/fp16_rounding.py [FAMILY...] > benches/results/fp16-rounding.json

Of each family, for four prompts and eight steps: the largest logit, and the largest difference of the 20 best log-probabilities from
fp32 where only the weights are rounded to fp16 (`weights`), where caches are, too (`weights_and_caches`), and where all arithmetic
is transformers' own fp16 (`fp16`). Of mixtures of experts also the positions, of all layers, whose chosen experts differ from fp32's (`rerouted`).
`minicpm3-scaled` and `nemotron-scaled` have logits and norms of the size that trained models have.
"""

import json
import sys
import warnings

import torch
import transformers
from make_family_fixtures import FAMILIES, LATENT, PROMPTS, STEPS, USUAL, build
from transformers.cache_utils import DynamicLayer

warnings.filterwarnings("ignore")
BEST = 20
# Those of scripts/gpu/families.py.
ON_GPU = [[1, 20, 33, 47, 12, 7, 25, 90, 18, 64, 5], [(17 + 29 * i) % 94 + 3 for i in range(38)]]
# Hidden states before the head are divided by hidden_size / dim_model_base: 10 in MiniCPM3-4B, 1/8 with these dims.
FAMILIES["minicpm3-scaled"] = ("minicpm3", {**USUAL, **LATENT, "dim_model_base": 3})
# 1 + w near 1.
FAMILIES["nemotron-scaled"] = FAMILIES["nemotron"]


def rows(model, sequences):
    """Log-probabilities of the steps of each sequence, the largest logit, and the experts that each router chose."""
    found, largest, chosen = [], 0.0, []

    def note(_module, _inputs, outputs):
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        chosen.extend(part.sort(-1).values for part in parts if part.dtype == torch.int64)

    routers = [module for name, module in model.named_modules() if name.endswith((".router", ".gate"))]
    hooks = [router.register_forward_hook(note) for router in routers]
    for ids, prompt in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1].double()
        largest = max(largest, float(logits.abs().max()))
        found.append(torch.log_softmax(logits, -1))
    for hook in hooks:
        hook.remove()
    return found, largest, chosen


def worst(found, truth):
    best = [row.topk(BEST, dim=-1).indices for row in truth]
    pairs = zip(found, truth, best)
    return round(max(float((a - b).abs().gather(-1, top).max()) for a, b, top in pairs), 4)


def figures(family):
    model = build(family)
    if family == "nemotron-scaled":
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.data -= 1
    sequences = []
    for prompt in [*PROMPTS, *ON_GPU]:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(STEPS):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        sequences.append((ids, len(prompt)))
    half = torch.bfloat16 if family.endswith("-bf16") else torch.float16
    roundings = {torch.float16: 2048, torch.bfloat16: 256}[half]
    model.float()
    truth, largest, chosen = rows(model, sequences)
    model.to(half).float()
    weights, _, chosen_by_weights = rows(model, sequences)
    usual = DynamicLayer.update
    DynamicLayer.update = lambda self, keys, values, *given, **named: usual(self, keys.to(half).float(), values.to(half).float(), *given, **named)
    caches, *_ = rows(model, sequences)
    DynamicLayer.update = usual
    found, _, chosen_by_half = rows(model.to(half), sequences)
    name = "bf16" if half == torch.bfloat16 else "fp16"
    result = {
        "largest_logit": round(largest, 2),
        "weights": worst(weights, truth),
        "weights_and_caches": worst(caches, truth),
        name: worst(found, truth),
        f"{name}_in_roundings_of_the_largest_logit": round(worst(found, truth) / (largest / roundings), 1),
    }
    if chosen:
        differ = lambda others: sum(int((a != b).any(-1).sum()) for a, b in zip(others, chosen, strict=True))
        result["rerouted"] = {"of": sum(each.shape[0] for each in chosen), "weights": differ(chosen_by_weights), name: differ(chosen_by_half)}
    return result


def main():
    families = sys.argv[1:] or ["minicpm3", "minicpm3-scaled", "nemotron", "nemotron-scaled", "gemma2", "deepseek-v3", "glm", "phi3", "smollm3", "phimoe", "qwen3moe", "qwen3moe-bf16"]
    result = {"torch": torch.__version__, "transformers": transformers.__version__}
    result["families"] = {family: figures(family) for family in families}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
