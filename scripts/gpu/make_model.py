#!/usr/bin/env python3
"""A Llama of real size with random weights: a Hugging Face model on the GPU and its ONNX export, side by side.

The export is written directly, in the form of onnxruntime-genai's builder (GroupQueryAttention, weights as external data)
or with ONNX's own operators alone (export_forms.py), but with the checkpoint's own `[out, in]` weights behind a Transpose:
torch.onnx would take minutes and several copies of 16 GB for the same graph. `scripts/gpu/parity.py` and the outputs in
every benchmark compare it with transformers, so a wrong export cannot pass.

    python3 make_model.py 1b FOLDER          # 1.1 B parameters, fp16: about 2.2 GB
    python3 make_model.py 8b FOLDER
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export_forms import EPSILON, FORMS

SIZES = {
    # TinyLlama-1.1B, Llama-3-8B; `tiny` is for trying the scripts without a GPU.
    "1b": dict(hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, head_dim=64,
               intermediate_size=5632, vocab_size=32000, rope_theta=10000.0),
    "8b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
               intermediate_size=14336, vocab_size=128256, rope_theta=500000.0),
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 intermediate_size=96, vocab_size=300, rope_theta=10000.0),
}
# Largest position of each: that of the model it has the dims of, but for `tiny`, and for `1b`, whose peers are measured up to 8064.
POSITIONS = {"1b": 8192, "8b": 131072, "tiny": 4096}


def hugging_face(size, positions, dtype, device, seed=1):
    """The model with weights that keep activations near unit size, so that logits differ clearly."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = dict(SIZES[size])
    theta = facts.pop("rope_theta")
    config = LlamaConfig(**facts, max_position_embeddings=positions, rms_norm_eps=EPSILON, rope_theta=theta,
                         tie_word_embeddings=False)
    if getattr(config, "rope_parameters", None) is not None:
        config.rope_parameters["rope_theta"] = theta
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(before)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                spread = torch.randn(parameter.shape, generator=generator, device=device) * 0.1
                parameter.copy_(1 + spread)
                continue
            wide = any(part in name for part in ("embed", "lm_head"))
            scale = (2.0 if wide else 1.2) * parameter.shape[1] ** -0.5
            for rows in parameter.split(16384):
                rows.copy_(torch.randn(rows.shape, generator=generator, device=device) * scale)
    return model


class Export:
    """Collects nodes and initializers; tensors go to one data file as they come."""

    FLOAT, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT32, TensorProto.BOOL

    def __init__(self, folder, element):
        self.folder, self.element = folder, element
        self.nodes, self.initializers, self.position = [], [], 0
        folder.mkdir(parents=True, exist_ok=True)
        self.data = open(folder / "model.onnx.data", "wb")

    def node(self, op, inputs, outputs, domain="", **attributes):
        name = outputs[0] + "/" + op
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def weight(self, name, values):
        """`values`: a numpy array, or a torch tensor on any device."""
        offset = -(-self.position // 4096) * 4096
        self.data.seek(offset)
        host = values if isinstance(values, np.ndarray) else values.detach().cpu().contiguous().numpy()
        host.tofile(self.data)
        tensor = TensorProto(name=name, data_type=self.element, dims=list(values.shape))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", host.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.position = offset + host.nbytes
        return name

    def small(self, name, array):
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def linear(self, name, x, weight):
        turned = self.node("Transpose", [self.weight(name + ".weight", weight)], [name + "/transposed"], perm=[1, 0])
        return self.node("MatMul", [x, turned], [name + "/out"])


def export(model, folder, positions, form="genai"):
    config = model.config
    half = str(model.dtype) == "torch.float16"
    element = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    out = Export(folder, element)
    mask = "attention_mask"
    form = FORMS[form](out, config, theta_of(config), positions, np.float16 if half else np.float32)

    embedding = out.weight("model.embed_tokens.weight", model.model.embed_tokens.weight)
    x = out.node("Gather", [embedding, "input_ids"], ["embedded"], axis=0)
    past, present = [], []
    for i, layer in enumerate(model.model.layers):
        p = f"model.layers.{i}."

        def norm(name, x, module):
            return form.norm(p + name, x, out.weight(p + name + ".weight", module.weight))

        attention, mlp = layer.self_attn, layer.mlp
        h = norm("input_layernorm", x, layer.input_layernorm)
        q, k, v = (out.linear(p + f"self_attn.{n}_proj", h, getattr(attention, n + "_proj").weight) for n in "qkv")
        ins = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        outs = [f"present.{i}.{part}" for part in ("key", "value")]
        a = form.attention(p + "attention", q, k, v, ins, outs)
        o = out.linear(p + "self_attn.o_proj", a, attention.o_proj.weight)
        x = out.node("Add", [x, o], [p + "attended"])
        h = norm("post_attention_layernorm", x, layer.post_attention_layernorm)
        gate = out.linear(p + "mlp.gate_proj", h, mlp.gate_proj.weight)
        up = out.linear(p + "mlp.up_proj", h, mlp.up_proj.weight)
        s = out.node("Sigmoid", [gate], [p + "sigmoid"])
        s = out.node("Mul", [gate, s], [p + "silu"])
        s = out.node("Mul", [s, up], [p + "gated"])
        down = out.linear(p + "mlp.down_proj", s, mlp.down_proj.weight)
        x = out.node("Add", [x, down], [p + "output"])
        past += [(name, [0, kv_heads, "past_sequence_length", head_dim]) for name in ins]
        present += [(name, [0, kv_heads, "total_sequence_length", head_dim]) for name in outs]
    scale = out.weight("model.norm.weight", model.model.norm.weight)
    x = form.norm("normed", x, scale)
    logits = out.linear("lm_head", x, model.lm_head.weight)
    out.nodes[-1].output[0] = "logits"
    del logits
    out.data.close()

    def values(items, element):
        batch = lambda shape: ["batch_size" if d == 0 else d for d in shape]
        return [helper.make_tensor_value_info(name, element, batch(shape)) for name, shape in items]

    ids = ["input_ids", *(["position_ids"] if form.position_ids else [])]
    inputs = [(name, [0, "sequence_length"]) for name in ids] + [(mask, [0, "total_sequence_length"])]
    inputs = values(inputs, TensorProto.INT64)
    graph = helper.make_graph(
        out.nodes, "llama", inputs + values(past, element),
        values([("logits", [0, "sequence_length", config.vocab_size])], element) + values(present, element),
        initializer=out.initializers)
    opsets = [helper.make_opsetid(domain, version) for domain, version in form.opsets.items()]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="lapidary-make-model")
    onnx.save(made, folder / "model.onnx")
    facts = facts_of(config) | {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(facts) + "\n")


def theta_of(config):
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def facts_of(config):
    return {name: getattr(config, name) for name in SIZES["tiny"] if name != "rope_theta"}


def main():
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--positions", type=int, help="default: those of the model it has the dims of")
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", choices=FORMS, default="genai", help="of norms and attention")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[arguments.dtype]
    positions = arguments.positions or POSITIONS[arguments.size]
    model = hugging_face(arguments.size, positions, dtype, device, arguments.seed)
    export(model, arguments.folder, positions, arguments.form)


if __name__ == "__main__":
    main()
