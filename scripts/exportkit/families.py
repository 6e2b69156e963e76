"""Random-weight models of the supported families, small enough to commit.

Takes a `Shape`, gives a transformers model (fp32, eval) that is the same on every run. Default initial weights
make poor tests: norms are all ones, biases all zeros, logits nearly equal. So every parameter is redrawn with a
wide spread, and the seed is the first whose greedy run is not a loop and never a near tie.
"""

import json
from dataclasses import dataclass, field

import torch
import transformers

PROMPT_LENGTH = 11
STEPS = 8


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a model. `extra` goes to the config unchanged."""

    family: str
    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    intermediate: int = 48
    vocabulary: int = 97
    positions: int = 64
    tied: bool = False
    window: int | None = None
    extra: dict = field(default_factory=dict)


def config_of(shape):
    common = {
        "vocab_size": shape.vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": shape.tied,
    }
    if shape.family == "gpt2":
        return transformers.GPT2Config(
            n_embd=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.intermediate,
            n_positions=shape.positions,
            **(common | {"tie_word_embeddings": True} | shape.extra),
        )
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
    }
    if shape.family == "mistral":
        common["sliding_window"] = shape.window
    return classes[shape.family](
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-5,
        **(common | shape.extra),
    )


def prompt_of(vocabulary):
    """Eleven ids spread over the vocabulary, the first being bos."""
    return [1] + [(17 + 29 * i) % (vocabulary - 3) + 3 for i in range(PROMPT_LENGTH - 1)]


# Parts of the names of embeddings and heads.
WIDE = ("embed", "wte", "lm_head")


def spread_weights(model, seed, scale=1.2, wide=WIDE):
    """Weights of a model from a config, about unit size after each product at any width. Embeddings and the head (`wide`) have more,
    so that tokens and logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    # GPT-2's layers have [inputs, outputs], all others [outputs, inputs].
    inputs_first = {id(m.weight) for m in model.modules() if isinstance(m, transformers.pytorch_utils.Conv1D)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.2 * spread + (1 if name.endswith("weight") else 0))
            else:
                inputs = parameter.shape[0 if id(parameter) in inputs_first else -1]
                is_wide = any(part in name for part in wide)
                parameter.copy_(spread * (2.0 if is_wide else scale) * inputs**-0.5)


def greedy_with_torch(model, prompt, steps=STEPS):
    """Greedy tokens and logits (`[steps + 1, vocabulary]`) without any cache: each step runs the whole text."""
    ids, rows = list(prompt), []
    with torch.no_grad():
        for _ in range(steps + 1):
            row = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            rows.append(row)
            ids.append(int(row.argmax()))
    return ids[len(prompt) :], torch.stack(rows)


def build(shape):
    """The model of this shape, and the seed it took."""
    config = config_of(shape)
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for seed in range(200):
        spread_weights(model, seed, wide=(*WIDE, "wpe"))
        tokens, logits = greedy_with_torch(model, prompt_of(shape.vocabulary))
        best = logits.topk(2, dim=-1).values
        if (best[:, 0] - best[:, 1]).min() > 0.08 and len(set(tokens)) >= 5 and 2 not in tokens:
            return model, seed
    raise RuntimeError(f"no seed gives a lively greedy run for {shape}")


def save(model, shape, folder):
    """A Hugging Face checkpoint with the smallest tokenizer that the builders accept."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model.save_pretrained(folder)
    words = {f"t{i}": i for i in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", pad_token="t0", unk_token="t0"
    ).save_pretrained(folder)
    # Newer transformers look for rope_theta inside rope_parameters and read the old place as well.
    return json.loads((folder / "config.json").read_text())
