#!/usr/bin/env python3
"""Make fixtures/families/: tiny models of families that need something of their own, by two exporters each where two take them.

Each folder EXPORTER-FAMILY holds model.onnx and reference.json: for a short and a long prompt, greedy tokens and the best
log-probabilities of each step, as ONNX Runtime (basic optimizations) computes them from that very file. Deterministic: the same
versions give the same files. Only for those who add a fixture; the environments are those of make_fixtures.py:

    export/bin/python scripts/make_family_fixtures.py fixtures/families optimum
    export/bin/python scripts/make_family_fixtures.py fixtures/families dynamo18
    t5/bin/python scripts/make_family_fixtures.py fixtures/families dynamo18 minicpm3

`FAMILY...` makes just those. Models that an exporter refuses are reported and omitted.
"""

import argparse
import contextlib
import inspect
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from transformers import cache_utils

from exportkit.exporters import masks_without_vmap, save_dynamo
from exportkit.families import Shape, save, spread_weights

VOCABULARY = 97
STEPS = 8
# The long one goes beyond the windows of 8 and the switch at 32 positions, and the steps after the short one do not.
PROMPTS = [[1] + [(17 + 29 * i) % 94 + 3 for i in range(10)], [1] + [(5 + 31 * i) % 94 + 3 for i in range(34)]]

USUAL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Heads of hidden_size / num_attention_heads.
PLAIN = {name: value for name, value in USUAL.items() if name != "head_dim"}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.0, 2.5]}
PHIMOE = {"router_jitter_noise": 0.2, "attention_bias": True, "lm_head_bias": True}
# By family: the model type of transformers, and its configuration.
FAMILIES = {
    # ALiBi, from the mask and from a table; six heads have slopes that are no powers of two.
    "bloom": ("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "attn_config": {"alibi": True}}),
    # One key head for all; keys repeated for all heads before the cache.
    "falcon7": ("falcon", {**FALCON, "multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon40": ("falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    # Rotary tables that switch with the length.
    "phi3-longrope": ("phi3", {**PLAIN, "original_max_position_embeddings": 32, "rope_scaling": LONGROPE}),
    # Multi-head latent attention; by transformers 5 with the latent rows in the cache.
    "minicpm3": ("minicpm3", {**USUAL, **LATENT}),
    "deepseek-v3": ("deepseek_v3", {**USUAL, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 2, "n_group": 2, "topk_group": 1}),
    # Sinks beside the scores.
    "gpt-oss": ("gpt_oss", {**USUAL, **EXPERTS, "sliding_window": 8}),
    # The same as a factor after attention, by the log of its denominator; layers with a window and without a rotation.
    "granite-sinks": ("granite_swa", {**USUAL, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "attention_multiplier": 0.13}),
    "granitemoe-sinks": ("granitemoe_swa", {**USUAL, **EXPERTS, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    # Differences of attention: heads in pairs, two values of each.
    "diffllama": ("diffllama", {**PLAIN, "num_attention_heads": 8, "num_key_value_heads": 4}),
    # Interleaved rotation by repeated columns; a partial one.
    "cohere": ("cohere", USUAL),
    "glm": ("glm", USUAL),
    # Windows in a table; positions that begin at 2; layers without a rotation.
    "gpt-neo": ("gpt_neo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8, "max_position_embeddings": 64, "intermediate_size": 48}),
    "opt": ("opt", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "smollm3": ("smollm3", {**USUAL, "no_rope_layers": [1, 0]}),
    "exaone4": ("exaone4", {**USUAL, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    # Capped scores; partial rotations, interleaved and by halves; one matrix for queries, keys and values.
    "gemma2": ("gemma2", {**USUAL, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    "gptneox": ("gpt_neox", {**PLAIN, "rotary_pct": 0.25}),
    "phi3": ("phi3", PLAIN),
    # LayerNorm by 1 + w, squared ReLU.
    "nemotron": ("nemotron", USUAL),
    # Norms of each head of queries and keys, each with a weight of its own.
    "stablelm-norms": ("stablelm", {**PLAIN, "partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}),
    # Mixtures of experts.
    "qwen2moe": ("qwen2_moe", {**USUAL, **EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}),
    "qwen3moe": ("qwen3_moe", {**USUAL, **EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "mixtral": ("mixtral", {**USUAL, **EXPERTS}),
    "granitemoe": ("granitemoe", {**PLAIN, **EXPERTS}),
    # Weights by the sigmoid of the logits that a correction chose.
    "kolibri1": ("kolibri1", {**USUAL, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "olmoe": ("olmoe", {**PLAIN, **EXPERTS}),
    # Experts chosen one after the other, among close ones; norms and projections with biases.
    "phimoe": ("phimoe", {**PLAIN, **EXPERTS, **PHIMOE}),
    # A number of sequences that the export fixes.
    "llama-batch2": ("llama", USUAL),
    # In bf16, for the separate folder fixtures/bf16.
    "qwen3moe-bf16": ("qwen3_moe", {**USUAL, **EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True}),
}
# Sequences of the families that are exported for one number of them.
FIXED_BATCH = {"llama-batch2": 2}


def build(family):
    kind, settings = FAMILIES[family]
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if "num_experts" in settings and hasattr(model, "set_experts_implementation"):
        # The loop over experts, transformers 5's own, is refused by the exporter.
        model.set_experts_implementation("batched_mm")
    spread_weights(model, 1, 1.2)
    return model.bfloat16() if family.endswith("-bf16") else model


class FlatPast(torch.nn.Module):
    """input_ids, attention_mask, position_ids, then past keys and values in turn."""

    def __init__(self, model):
        super().__init__()
        self.m = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = cache_utils.DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        result = self.m(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions)
        return (result.logits, *(part for layer in result.past_key_values.layers for part in (layer.keys, layer.values)))


def example_of(model, batch):
    """Inputs of FlatPast for so many sequences, and names of the caches."""
    with torch.no_grad():
        cached = model(input_ids=torch.ones(batch, 5, dtype=torch.int64), use_cache=True).past_key_values
    past = [torch.randn_like(part) for layer in cached.layers for part in (layer.keys, layer.values)]
    names = [f"past_key_values.{i}.{part}" for i in range(len(past) // 2) for part in ("key", "value")]
    example = (
        torch.ones(batch, 3, dtype=torch.int64),
        torch.ones(batch, 8, dtype=torch.int64),
        torch.arange(5, 8).expand(batch, 3).contiguous(),
        past,
    )
    return example, names


def names_of(caches):
    return {
        "input_names": ["input_ids", "attention_mask", "position_ids", *caches],
        "output_names": ["logits", *(name.replace("past_key_values", "present") for name in caches)],
    }


def dynamo(model, folder, opset, batch):
    example, caches = example_of(model, batch or 2)
    free = {} if batch else {0: "batch"}
    rows = {**free, 1: "sequence_length"}
    program = torch.onnx.export(
        FlatPast(model).eval(),
        example,
        dynamo=True,
        opset_version=opset,
        verbose=False,
        **names_of(caches),
        dynamic_shapes=(rows, {**free, 1: "total_length"}, rows, [{**free, 2: "past_length"} for _ in caches]),
    )
    save_dynamo(program, folder)


def torchscript(model, folder, opset, batch):
    example, caches = example_of(model, batch or 2)
    free = {} if batch else {0: "batch"}
    rows = {**free, 1: "sequence_length"}
    names = names_of(caches)
    axes = {"input_ids": rows, "attention_mask": {**free, 1: "total_length"}, "position_ids": rows, "logits": rows}
    axes |= {name: {**free, 2: "past_length"} for name in caches}
    axes |= {name: {**free, 2: "total_length"} for name in names["output_names"][1:]}
    folder.mkdir(parents=True)
    # Without help, TorchScript can trace the masks of transformers 5.
    masks = contextlib.nullcontext() if transformers.__version__.startswith("5") else masks_without_vmap()
    with masks:
        torch.onnx.export(
            FlatPast(model).eval(),
            example,
            folder / "model.onnx",
            dynamo=False,
            opset_version=opset,
            **names,
            dynamic_axes=axes,
        )


def optimum(model, folder):
    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, built = Path(scratch) / "checkpoint", Path(scratch) / "built"
        save(model, Shape("", vocabulary=VOCABULARY), checkpoint)
        main_export(str(checkpoint), output=str(built), task="text-generation-with-past", do_validation=False)
        folder.mkdir(parents=True)
        shutil.copy(built / "model.onnx", folder)


def reference(path):
    """Greedy tokens and best log-probabilities of each prompt."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    outputs = [value.name for value in session.get_outputs()]
    caches = [value for value in inputs if value.name.startswith("past_key_values")]
    runs = []
    for prompt in PROMPTS:
        ids, length, tokens, top = list(prompt), 0, [], []
        # Other sequences beside the prompt where the export fixes their number.
        batch = next(value.shape[0] for value in inputs if value.name == "input_ids")
        batch = batch if isinstance(batch, int) else 1
        others = [[(7 * token + 13 * row) % 94 + 3 for token in prompt] for row in range(1, batch)]
        cache = {value.name: np.zeros([dim if isinstance(dim, int) else int("batch" in dim) for dim in value.shape], np.float32) for value in caches}
        for _ in range(STEPS):
            positions = np.tile(np.arange(length, length + len(ids), dtype=np.int64), (batch, 1))
            rows = np.array([ids, *(other[: len(ids)] for other in others)], np.int64)
            feed = {"input_ids": rows, "attention_mask": np.ones((batch, length + len(ids)), np.int64), "position_ids": positions}
            feed = {value.name: feed[value.name] for value in inputs if value.name in feed} | cache
            found = dict(zip(outputs, session.run(None, feed)))
            cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
            length += len(ids)
            row = found["logits"][0, -1].astype(np.float64)
            row -= row.max() + np.log(np.exp(row - row.max()).sum())
            best = np.argsort(-row, kind="stable")[:5]
            top.append([[int(token), round(float(row[token]), 6)] for token in best])
            ids = [int(best[0])]
            tokens += ids
        runs.append({"prompt": prompt, "tokens": tokens, "top": top})
    return runs


def reference_by_torch(model):
    """The same of a model in bf16, which ONNX Runtime does not run: its weights in the arithmetic of fp32."""
    model, runs = model.float(), []
    for prompt in PROMPTS:
        ids, top = list(prompt), []
        for _ in range(STEPS):
            with torch.no_grad():
                row = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1)
            best = row.topk(5).indices.tolist()
            top.append([[token, round(float(row[token]), 6)] for token in best])
            ids.append(best[0])
        runs.append({"prompt": prompt, "tokens": ids[len(prompt) :], "top": top})
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("exporter", help="optimum, or dynamo or torchscript and an opset")
    parser.add_argument("family", nargs="*")
    arguments = parser.parse_args()
    for family in arguments.family or [family for family in FAMILIES if not family.endswith("-bf16")]:
        folder = arguments.target / f"{arguments.exporter}-{family}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            model = build(family)
            if arguments.exporter == "optimum":
                optimum(model, folder)
            else:
                export = dynamo if arguments.exporter.startswith("dynamo") else torchscript
                opset = int(arguments.exporter.removeprefix(export.__name__))
                export(model, folder, opset, FIXED_BATCH.get(family))
            runs = reference_by_torch(model) if family.endswith("-bf16") else reference(folder / "model.onnx")
        except Exception as error:  # noqa: BLE001 - an exporter that refuses a family is a finding, not the end
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{folder.name}: FAILED {type(error).__name__}: {(str(error).strip() or '?').splitlines()[-1][:200]}", file=sys.stderr)
            continue
        lines = [" " + json.dumps(run) for run in runs]
        (folder / "reference.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
        print(f"{folder.name}: {(folder / 'model.onnx').stat().st_size // 1024} KiB", file=sys.stderr)


if __name__ == "__main__":
    main()
