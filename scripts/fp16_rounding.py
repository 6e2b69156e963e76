#!/usr/bin/env python3
"""Effect of fp16 on tiny models of some families, measured with transformers only: differences of log-probabilities.

    t5/bin/python scripts/fp16_rounding.py [FAMILY...] > benches/results/fp16-rounding.json

Of each family, for two prompts and eight steps: the largest logit, and the largest difference of the 20 best log-probabilities from
fp32 where only the weights are rounded to fp16 (`weights`), where caches are, too (`weights_and_caches`), and where all arithmetic
is transformers' own fp16 (`fp16`). `minicpm3-scaled` and `nemotron-scaled` have logits and norms of the size that trained models have.
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
# Hidden states before the head are divided by hidden_size / dim_model_base: 10 in MiniCPM3-4B, 1/8 with these dims.
FAMILIES["minicpm3-scaled"] = ("minicpm3", {**USUAL, **LATENT, "dim_model_base": 3})
# 1 + w near 1.
FAMILIES["nemotron-scaled"] = FAMILIES["nemotron"]


def rows(model, sequences):
    """Log-probabilities of the steps of each sequence, and the largest logit."""
    found, largest = [], 0.0
    for ids, prompt in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1].double()
        largest = max(largest, float(logits.abs().max()))
        found.append(torch.log_softmax(logits, -1))
    return found, largest


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
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(STEPS):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        sequences.append((ids, len(prompt)))
    truth, largest = rows(model, sequences)
    model.half().float()
    weights, _ = rows(model, sequences)
    usual = DynamicLayer.update
    DynamicLayer.update = lambda self, keys, values, *given, **named: usual(self, keys.half().float(), values.half().float(), *given, **named)
    caches, _ = rows(model, sequences)
    DynamicLayer.update = usual
    half, _ = rows(model.half(), sequences)
    return {
        "largest_logit": round(largest, 2),
        "weights": worst(weights, truth),
        "weights_and_caches": worst(caches, truth),
        "fp16": worst(half, truth),
        "fp16_in_roundings_of_the_largest_logit": round(worst(half, truth) / (largest / 2048), 1),
    }


def main():
    families = sys.argv[1:] or ["minicpm3", "minicpm3-scaled", "nemotron", "nemotron-scaled", "gemma2", "deepseek-v3", "glm", "phi3", "smollm3"]
    result = {"torch": torch.__version__, "transformers": transformers.__version__}
    result["families"] = {family: figures(family) for family in families}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
