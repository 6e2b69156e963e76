#!/usr/bin/env python3
"""Held-out exports: families and options that were not used while the passes were written, with ONNX Runtime's answers.

    export/bin/python scripts/held_out_families.py make /work/held-out optimum
    t5/bin/python scripts/held_out_families.py make /work/held-out dynamo torchscript genai mobius
    python scripts/held_out_families.py check target/release/lapidary /work/held-out

`make` writes the cases of these exporters: folders of model.onnx, config.json and reference.json as in fixtures/families
(ONNX Runtime at basic optimizations; a short prompt and one that is longer than every window). The environments are those
of make_fixtures.py. `check` converts each and compares 20 log-probabilities of each step. `--only TEXT`: cases with TEXT in
their names. docs/contributing/held-out-exports.md lists the findings of each round.
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

STEPS, BEST = 6, 20
LIMITS = {"fp32": 3e-3, "fp16": 5e-2}
VOCABULARY = 131
# Head dims, widths and vocabulary are no powers of two.
USUAL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Heads of hidden_size / num_attention_heads.
PLAIN = {**{name: value for name, value in USUAL.items() if name != "head_dim"}, "hidden_size": 72}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "head_dim": 6,
}
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SLIDING = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GPT = {"n_embd": 60, "n_layer": 2, "n_head": 5, "n_positions": 64}


def scaling(kind, theta=10000.0):
    """A rotary scaling as transformers 4 and 5 name it."""
    return {"rope_theta": theta, "rope_scaling": kind, "rope_parameters": {**kind, "rope_theta": theta}}


# Exporter and opset, name, model type of transformers, configuration, options of the exporter.
CASES = [
    # torch.onnx, dynamo.
    ("dynamo23", "smollm3", "smollm3", {**USUAL, "num_hidden_layers": 3, "no_rope_layers": [1, 1, 0], "tie_word_embeddings": True}, {}),
    ("dynamo18", "olmo2-mqa", "olmo2", {**PLAIN, "num_key_value_heads": 1}, {}),
    ("dynamo23", "olmo3-window-yarn", "olmo3", {**PLAIN, "sliding_window": 6, "layer_types": SLIDING, "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": {**YARN, "rope_theta": 10000.0}}}, {}),
    ("dynamo20", "granite-bias", "granite", {**USUAL, "attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.13, "embedding_multiplier": 3.7, "logits_scaling": 5.1, "residual_multiplier": 0.31}, {}),
    ("dynamo18", "stablelm-norms", "stablelm", {**PLAIN, "partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}, {}),
    ("dynamo21", "phi-norms", "phi", {**PLAIN, "partial_rotary_factor": 0.34, "qk_layernorm": True}, {}),
    ("dynamo23", "cohere2", "cohere2", {**USUAL, "num_hidden_layers": 3, "sliding_window": 5, "layer_types": [*SLIDING, "sliding_attention"], "logit_scale": 0.3, "attention_bias": True}, {}),
    ("dynamo20", "cohere-norms", "cohere", {**PLAIN, "use_qk_norm": True}, {}),
    ("dynamo18", "gemma2-fp16", "gemma2", {**USUAL, "sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 30.0, "final_logit_softcapping": 20.0}, {"dtype": "fp16"}),
    ("dynamo23", "gemma-mqa", "gemma", {**USUAL, "num_key_value_heads": 1}, {}),
    ("dynamo18", "internlm3", "internlm3", {**USUAL, "qkv_bias": True, "bias": True}, {}),
    ("dynamo23", "seed-oss", "seed_oss", {**USUAL, "attention_bias": True, "attention_out_bias": True}, {}),
    ("dynamo23", "apertus-rope3", "apertus", {**USUAL, **scaling(LLAMA3)}, {}),
    ("dynamo23", "arcee-yarn", "arcee", {**USUAL, "mlp_bias": True, **scaling(YARN)}, {}),
    ("dynamo18", "dots1", "dots1", {**USUAL, **EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "sliding_window": 7, "layer_types": SLIDING, "routed_scaling_factor": 1.7}, {}),
    ("dynamo18", "longcat-flash", "longcat_flash", {**USUAL, **LATENT, **EXPERTS, "num_layers": 1, "ffn_hidden_size": 56, "expert_ffn_hidden_size": 20, "moe_topk": 2, "zero_expert_num": 2}, {}),
    ("dynamo18", "gpt-bigcode-mha", "gpt_bigcode", {**GPT, "multi_query": False}, {}),
    ("dynamo23", "codegen", "codegen", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 12, "n_positions": 64, "n_ctx": 64}, {}),
    ("dynamo18", "opt-after", "opt", {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": 28, "do_layer_norm_before": False}, {}),
    ("dynamo23", "xglm", "xglm", {"d_model": 60, "num_layers": 2, "attention_heads": 5, "ffn_dim": 44, "max_position_embeddings": 64}, {}),
    ("dynamo23", "helium", "helium", {**USUAL, "hidden_size": 120}, {}),
    ("dynamo18", "persimmon", "persimmon", {**PLAIN, "partial_rotary_factor": 0.5, "qk_layernorm": True}, {}),
    ("dynamo23", "nemotron", "nemotron", {**USUAL, "partial_rotary_factor": 0.6, "attention_bias": True}, {}),
    ("dynamo23", "vaultgemma", "vaultgemma", {**USUAL, "sliding_window": 6, "query_pre_attn_scalar": 20}, {}),
    ("dynamo18", "nanochat", "nanochat", PLAIN, {}),
    ("dynamo18", "youtu", "youtu", {**USUAL, **LATENT}, {}),
    ("dynamo18", "diffllama", "diffllama", PLAIN, {}),
    ("dynamo23", "ministral", "ministral", {**USUAL, "sliding_window": 6, "layer_types": SLIDING}, {}),
    ("dynamo18", "hyperclovax", "hyperclovax", {**USUAL, "attention_multiplier": 0.17, "residual_multiplier": 0.7}, {}),
    ("dynamo18", "ernie-moe", "ernie4_5_moe", {**USUAL, **EXPERTS, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0}, {}),
    ("dynamo18", "flex-olmo", "flex_olmo", {**PLAIN, **EXPERTS}, {}),
    ("dynamo18", "afmoe", "afmoe", {**USUAL, **EXPERTS, "num_dense_layers": 1, "sliding_window": 6, "layer_types": SLIDING}, {}),
    ("dynamo18", "jais2", "jais2", USUAL, {}),
    ("dynamo18", "neox-japanese", "gpt_neox_japanese", {**PLAIN, "rotary_pct": 0.5, "intermediate_multiple_size": 2}, {}),
    ("dynamo18", "bitnet", "bitnet", PLAIN, {}),
    ("dynamo23", "mistral-no-positions", "mistral", {**USUAL, "sliding_window": 7}, {"positions": False}),
    ("dynamo18", "qwen2-last-windows", "qwen2", {**PLAIN, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {}),
    ("dynamo23", "glm4", "glm4", {**USUAL, "attention_bias": True, "partial_rotary_factor": 0.5, "head_dim": 24}, {}),
    ("dynamo21", "ernie-bias", "ernie4_5", {**USUAL, "use_bias": True}, {}),
    ("dynamo23", "cohere2-fp16", "cohere2", {**USUAL, "sliding_window": 5, "layer_types": SLIDING, "logit_scale": 0.3}, {"dtype": "fp16"}),
    ("dynamo18", "gemma3-linear", "gemma3_text", {**USUAL, "sliding_window": 5, "layer_types": SLIDING, "query_pre_attn_scalar": 20, "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}}, {}),
    ("dynamo18", "granite-windows", "granite_swa", {**USUAL, "sliding_window": 5, "layer_types": SLIDING}, {}),
    ("dynamo18", "granitemoe-windows", "granitemoe_swa", {**USUAL, **EXPERTS, "sliding_window": 5, "layer_types": SLIDING}, {}),
    ("dynamo18", "mimo-v2", "mimo_v2_flash", {**USUAL, **EXPERTS, "sliding_window": 5, "layer_types": SLIDING}, {}),
    ("dynamo18", "glm4-moe-lite", "glm4_moe_lite", {**USUAL, **LATENT, **EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}, {}),
    ("dynamo18", "deepseek-v2-yarn", "deepseek_v2", {**USUAL, **LATENT, **EXPERTS, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, **scaling({**YARN, "mscale": 0.7, "mscale_all_dim": 0.7})}, {}),
    ("dynamo18", "phimoe", "phimoe", {**USUAL, **EXPERTS, "attention_bias": True, "lm_head_bias": True}, {}),
    ("dynamo18", "hunyuan-moe", "hunyuan_v1_moe", {**USUAL, **EXPERTS, "moe_topk": 2}, {}),
    ("dynamo18", "minimax-m2", "minimax_m2", {**USUAL, **EXPERTS, "rotary_dim": 10, "use_qk_norm": True}, {}),
    ("dynamo18", "solar-open", "solar_open", {**USUAL, **EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}, {}),
    ("dynamo18", "jetmoe", "jetmoe", {**USUAL, **EXPERTS, "kv_channels": 20}, {}),
    ("dynamo18", "doge", "doge", PLAIN, {}),
    ("dynamo18", "cwm", "cwm", {**USUAL, "sliding_window": 6, "layer_types": SLIDING}, {}),
    ("dynamo18", "llama4", "llama4_text", {**USUAL, **EXPERTS, "intermediate_size_mlp": 56, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 8}, {}),
    ("dynamo18", "modernbert-decoder", "modernbert-decoder", {**PLAIN, "sliding_window": 8, "local_attention": 8}, {}),
    ("dynamo18", "gemma3n", "gemma3n_text", {**USUAL, "sliding_window": 6, "layer_types": SLIDING, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 8}, {}),
    ("dynamo18", "whisper-decoder", "whisper", {"d_model": 48, "decoder_layers": 2, "encoder_layers": 1, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 40, "encoder_ffn_dim": 40}, {}),
    # torch.onnx, TorchScript.
    ("torchscript12", "stablelm-eager", "stablelm", {**PLAIN, "partial_rotary_factor": 0.5, "use_qkv_bias": True}, {"eager": True}),
    ("torchscript13", "gptj-eager", "gptj", {**GPT, "n_embd": 80, "rotary_dim": 12}, {"eager": True}),
    ("torchscript11", "xglm-eager", "xglm", {"d_model": 60, "num_layers": 2, "attention_heads": 5, "ffn_dim": 44, "max_position_embeddings": 64}, {"eager": True}),
    ("torchscript13", "gemma2-eager", "gemma2", {**USUAL, "sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 30.0}, {"eager": True}),
    ("torchscript17", "starcoder2", "starcoder2", {**PLAIN, "sliding_window": 7, "use_bias": True, "tie_word_embeddings": True}, {}),
    ("torchscript17", "glm4", "glm4", {**USUAL, "attention_bias": True, "partial_rotary_factor": 0.5, "head_dim": 24}, {}),
    ("torchscript17", "gemma3-window", "gemma3_text", {**USUAL, "sliding_window": 5, "layer_types": SLIDING, "query_pre_attn_scalar": 20}, {}),
    ("torchscript17", "ernie-bias", "ernie4_5", {**USUAL, "use_bias": True}, {}),
    ("torchscript17", "hunyuan", "hunyuan_v1_dense", {**USUAL, "attention_bias": True}, {}),
    ("torchscript16", "gpt-bigcode-mqa", "gpt_bigcode", {**GPT, "multi_query": True}, {}),
    ("torchscript15", "opt-plain", "opt", {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": 48, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"}, {}),
    ("torchscript18", "biogpt", "biogpt", {"hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 44, "max_position_embeddings": 64}, {}),
    ("torchscript17", "llama-odd-axes", "llama", USUAL, {"axes": {"batch": "x.1", "sequence_length": "7", "past_length": "dim 2", "total_length": "dim 2"}}),
    ("torchscript17", "qwen3-batch1", "qwen3", {**USUAL, "attention_bias": True}, {"batch": 1}),
    ("torchscript20", "mistral-no-positions", "mistral", {**USUAL, "sliding_window": 6}, {"positions": False}),
    # optimum.
    ("optimum14", "phi", "phi", {**PLAIN, "num_key_value_heads": 6, "partial_rotary_factor": 0.5}, {}),
    ("optimum17", "stablelm", "stablelm", {**PLAIN, "num_key_value_heads": 6, "partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True}, {}),
    ("optimum18", "llama-yarn", "llama", {**USUAL, "attention_bias": True, **scaling(YARN)}, {}),
    ("optimum16", "olmo2", "olmo2", PLAIN, {}),
    ("optimum18", "granite", "granite", {**PLAIN, "attention_multiplier": 0.13, "embedding_multiplier": 3.7, "logits_scaling": 5.1, "residual_multiplier": 0.31}, {}),
    ("optimum15", "opt-after", "opt", {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": 28, "do_layer_norm_before": False}, {}),
    ("optimum18", "arcee", "arcee", {**USUAL, "mlp_bias": True}, {}),
    ("optimum18", "helium", "helium", {**USUAL, "hidden_size": 120}, {}),
    ("optimum18", "bart-decoder", "bart", {"d_model": 48, "decoder_layers": 2, "encoder_layers": 1, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 40, "encoder_ffn_dim": 40, "max_position_embeddings": 64}, {}),
    ("optimum18", "gpt-bigcode", "gpt_bigcode", {**GPT, "multi_query": True}, {}),
    ("optimum13", "codegen", "codegen", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 12, "n_positions": 64, "n_ctx": 64}, {}),
    ("optimum18", "qwen3-window", "qwen3", {**USUAL, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {}),
    ("optimum18", "mistral-nemo", "mistral", {**USUAL, "sliding_window": None, "head_dim": 12}, {}),
    # onnxruntime-genai's builder.
    ("genai", "smollm3", "smollm3", {**PLAIN, "num_hidden_layers": 3, "no_rope_layers": [1, 1, 0]}, {}),
    ("genai", "gemma2", "gemma2", {**USUAL, "head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 32}, {}),
    ("genai", "olmo", "olmo", {**USUAL, "hidden_size": 96, "head_dim": 16}, {}),
    ("genai", "granite", "granite", {**USUAL, "hidden_size": 96, "head_dim": 16, "attention_multiplier": 0.13, "embedding_multiplier": 3.7, "logits_scaling": 5.1, "residual_multiplier": 0.31}, {}),
    ("genai", "nemotron", "nemotron", {**USUAL, "head_dim": 32, "partial_rotary_factor": 0.5}, {}),
    ("genai", "ernie", "ernie4_5", {**USUAL, "head_dim": 32}, {}),
    ("genai", "qwen3-hidden", "qwen3", {**USUAL, "head_dim": 32}, {"extra": ["include_hidden_states=true"]}),
    ("genai", "llama-embeds", "llama", {**USUAL, "head_dim": 32}, {"extra": ["exclude_embeds=true"], "reference": False}),
    ("genai", "phi3", "phi3", {**PLAIN, "hidden_size": 96, "sliding_window": 6}, {}),
    # mobius.
    ("mobius", "starcoder2", "starcoder2", {**PLAIN, "sliding_window": None, "use_bias": True}, {}),
    ("mobius", "olmo2", "olmo2", PLAIN, {}),
    ("mobius", "cohere", "cohere", PLAIN, {}),
    ("mobius", "opt", "opt", {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": 48}, {}),
    ("mobius", "persimmon", "persimmon", {**PLAIN, "num_key_value_heads": 6, "partial_rotary_factor": 0.5}, {}),
    ("mobius", "gpt-neox", "gpt_neox", {**PLAIN, "rotary_pct": 0.5, "num_key_value_heads": 6}, {}),
    ("mobius", "nanochat", "nanochat", PLAIN, {}),
    ("mobius", "llama-gqa", "llama", {**USUAL, "head_dim": 32}, {"extra": ["--optimize=group_query_attention,skip_norm"]}),
    ("mobius", "starcoder2-static", "starcoder2", {**PLAIN, "sliding_window": None, "use_bias": True}, {"extra": ["--static-cache", "--max-seq-len", "64"], "reference": False}),
    ("mobius", "gptj", "gptj", {**GPT, "n_embd": 80, "rotary_dim": 12}, {}),
    ("mobius", "falcon", "falcon", {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}, {}),
    ("mobius", "bloom", "bloom", {"hidden_size": 60, "n_layer": 2, "n_head": 5}, {}),
    ("mobius", "phi", "phi", {**PLAIN, "num_key_value_heads": 6, "partial_rotary_factor": 0.5}, {}),
    ("mobius", "granite", "granite", {**PLAIN, "attention_multiplier": 0.13, "embedding_multiplier": 3.7, "logits_scaling": 5.1, "residual_multiplier": 0.31}, {}),
    ("mobius", "gemma2", "gemma2", {**USUAL, "sliding_window": 6, "query_pre_attn_scalar": 20}, {}),
    ("mobius", "exaone4", "exaone4", {**USUAL, "sliding_window": 6, "layer_types": SLIDING}, {}),
    ("mobius", "hunyuan", "hunyuan_v1_dense", USUAL, {}),
    ("mobius", "apertus", "apertus", USUAL, {}),
    ("mobius", "qwen3-cuda", "qwen3", {**USUAL, "head_dim": 32}, {"extra": ["--ep", "cuda"]}),
]  # fmt: skip


# --- making ----------------------------------------------------------------------------------------------------


def build(kind, settings):
    """A model with weights that spread, and the same on every run."""
    import torch
    import transformers
    from exportkit.families import spread_weights

    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if hasattr(model, "set_experts_implementation"):
        # The loop over experts, transformers 5's own, is refused by the exporter.
        with contextlib.suppress(Exception):
            model.set_experts_implementation("batched_mm")
    spread_weights(model, 5, 1.1)
    return model


def save_checkpoint(model, folder):
    from exportkit.families import Shape, save

    save(model, Shape("", vocabulary=VOCABULARY), folder)


def flat(model, positions):
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
            result = self.m(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given)
            return (result.logits, *(part for layer in result.past_key_values.layers for part in (layer.keys, layer.values)))

    class WithoutPositions(Flat):
        def forward(self, input_ids, attention_mask, past):
            return super().forward(input_ids, attention_mask, None, past)

    return (Flat() if positions else WithoutPositions()).eval()


def torch_export(model, folder, opset, script, batch=None, positions=True, axes=(), dtype="fp32", eager=False):
    import torch
    from exportkit.exporters import save_dynamo

    axes = dict(axes)
    dims = {name: axes.get(name, name) for name in ("batch", "sequence_length", "past_length", "total_length")}
    model = model.half() if dtype == "fp16" else model
    if eager:
        model.set_attn_implementation("eager")
    rows = batch or 2
    with torch.no_grad():
        cached = model(input_ids=torch.ones(rows, 4, dtype=torch.int64), use_cache=True).past_key_values
    past = [torch.randn(part.shape[:2] + (5,) + part.shape[3:], dtype=part.dtype) for layer in cached.layers for part in (layer.keys, layer.values)]
    caches = [f"past_key_values.{i}.{part}" for i in range(len(past) // 2) for part in ("key", "value")]
    ids, mask, places = torch.ones(rows, 3, dtype=torch.int64), torch.ones(rows, 8, dtype=torch.int64), torch.arange(5, 8).expand(rows, 3).contiguous()
    free = {} if batch else {0: dims["batch"]}
    by_token, by_total = {**free, 1: dims["sequence_length"]}, {**free, 1: dims["total_length"]}
    example = (ids, mask, places, past) if positions else (ids, mask, past)
    names = ["input_ids", "attention_mask", *(["position_ids"] if positions else []), *caches]
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in caches)]
    wrapped = flat(model, positions)
    if script:
        given = {"input_ids": by_token, "attention_mask": by_total, "position_ids": by_token, "logits": by_token}
        given = {name: value for name, value in given.items() if name in [*names, *outputs]}
        given |= {name: {**free, 2: dims["past_length"]} for name in caches}
        given |= {name: {**free, 2: dims["total_length"]} for name in outputs[1:]}
        folder.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(wrapped, example, folder / "model.onnx", dynamo=False, opset_version=opset, input_names=names, output_names=outputs, dynamic_axes=given)
        return
    shapes = [by_token, by_total, *([by_token] if positions else []), [{**free, 2: dims["past_length"]} for _ in caches]]
    program = torch.onnx.export(wrapped, example, dynamo=True, opset_version=opset, verbose=False, input_names=names, output_names=outputs, dynamic_shapes=tuple(shapes))
    save_dynamo(program, folder)


def by_optimum(model, folder, opset):
    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, built = Path(scratch) / "checkpoint", Path(scratch) / "built"
        save_checkpoint(model, checkpoint)
        main_export(str(checkpoint), output=str(built), task="text-generation-with-past", do_validation=False, opset=opset)
        folder.mkdir(parents=True, exist_ok=True)
        name = "model.onnx" if (built / "model.onnx").exists() else "decoder_with_past_model.onnx"
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
            free = {0: 1, 1: kv_heads, 2: 0, 3: head_dim}
            dims = [dim if isinstance(dim, int) else free[axis] for axis, dim in enumerate(value.shape)]
            cache[value.name] = np.zeros(dims, types[value.type])
        for _ in range(STEPS):
            total = length + len(ids)
            feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, total), np.int64), "position_ids": np.arange(length, total, dtype=np.int64)[None]}
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


def make(target, exporters, only):
    for exporter, name, kind, settings, options in CASES:
        label = f"{exporter}-{name}"
        tool, opset = exporter.rstrip("0123456789"), exporter.lstrip("abcdefghijklmnopqrstuvwxyz")
        if tool not in exporters or only not in label:
            continue
        folder = target / label
        shutil.rmtree(folder, ignore_errors=True)
        try:
            model = build(kind, settings)
            given = {name: value for name, value in options.items() if name != "reference"}
            if tool == "optimum":
                by_optimum(model, folder, int(opset))
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
    making.add_argument("exporter", nargs="+", help="optimum, dynamo, torchscript, genai, mobius")
    checking = actions.add_parser("check")
    checking.add_argument("binary", type=Path)
    checking.add_argument("target", type=Path)
    checking.add_argument("--json", type=Path, help="write the findings here")
    for action in (making, checking):
        action.add_argument("--only", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.target, arguments.exporter, arguments.only)
    else:
        check(arguments.binary, arguments.target, arguments.only, arguments.json)


if __name__ == "__main__":
    main()
