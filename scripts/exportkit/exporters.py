"""One function per exporter: a saved checkpoint in, `model.onnx` out, and the form of its cache.

The functions of `EXPORTERS` take `(model, checkpoint, folder, shape)` and return a `CacheForm`. Those of torch and
optimum run here (transformers 4.57); the ORT-GenAI and mobius builders need transformers 5 and run in another
interpreter, named by the environment variable `EXPORTKIT_T5_PYTHON`.
"""

import contextlib
import copy
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from transformers import cache_utils

CAPACITY = 32


@dataclass
class CacheForm:
    """How to decode with an export: `concat`, `static` (cache_position) or `tensor-scatter` (mobius)."""

    kind: str
    pairs: list  # of (input name, output name), keys and values
    logits: str = "logits"
    capacity: int | None = None


def past_names(layers):
    return [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def present_names(layers):
    return [f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def concat_form(layers):
    return CacheForm("concat", list(zip(past_names(layers), present_names(layers))))


# --- wrappers for the torch exporters ------------------------------------------------------------------------


class WritableLayer(cache_utils.CacheLayerMixin):
    """A static cache layer over buffers that come from outside: writes, then gives back the whole buffer."""

    is_sliding = False

    def __init__(self, keys, values, write):
        super().__init__()
        self.keys, self.values, self.write, self.is_initialized = keys, values, write, True

    def lazy_initialization(self, *_):
        pass

    def update(self, key_states, value_states, cache_kwargs=None):
        position = cache_kwargs["cache_position"]
        self.keys = self.write(self.keys, position, key_states)
        self.values = self.write(self.values, position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, cache_position):
        return self.keys.shape[2], 0

    def get_seq_length(self):
        return 0

    def get_max_cache_shape(self):
        return self.keys.shape[2]


def index_copy(buffer, position, new):
    return buffer.index_copy(2, position, new)


def index_put(buffer, position, new):
    buffer = buffer.clone()
    buffer[:, :, position] = new
    return buffer


def index_put_grid(buffer, position, new):
    """`buffer[:, :, position] = new` for TorchScript, which writes the lengths of slices into the graph as constants."""
    rows = torch.arange(buffer.shape[0])[:, None, None]
    heads = torch.arange(buffer.shape[1])[None, :, None]
    return buffer.index_put((rows, heads, position[None, None, :]), new)


class StaticPast(torch.nn.Module):
    """input_ids `[1, S]`, cache_position `[S]`, buffers `[1, kv_heads, CAPACITY, head_dim]`."""

    def __init__(self, model, write):
        super().__init__()
        self.m, self.write = model, write

    def forward(self, input_ids, cache_position, past):
        layers = [WritableLayer(past[i], past[i + 1], self.write) for i in range(0, len(past), 2)]
        cache = cache_utils.Cache(layers=layers)
        logits = self.m(
            input_ids=input_ids,
            past_key_values=cache,
            cache_position=cache_position,
            position_ids=cache_position.unsqueeze(0),
            use_cache=True,
        ).logits
        return (logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


class FlatPast(torch.nn.Module):
    """input_ids, attention_mask, position_ids, then past keys and values in turn; all growing by concat."""

    def __init__(self, model):
        super().__init__()
        self.m = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = cache_utils.DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        logits = self.m(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return (logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


def kv_heads_of(shape):
    return shape.heads if shape.family == "gpt2" else shape.kv_heads


def head_dim_of(shape):
    return shape.hidden // shape.heads if shape.family == "gpt2" else shape.head_dim


def concat_example(shape, dtype, batch=2, past=5, tokens=3):
    buffers = [
        torch.randn(batch, kv_heads_of(shape), past, head_dim_of(shape), dtype=dtype) for _ in range(2 * shape.layers)
    ]
    return (
        torch.ones(batch, tokens, dtype=torch.int64),
        torch.ones(batch, past + tokens, dtype=torch.int64),
        torch.arange(past, past + tokens).expand(batch, tokens).contiguous(),
        buffers,
    )


def static_example(shape, dtype, tokens=3):
    buffers = [torch.zeros(1, kv_heads_of(shape), CAPACITY, head_dim_of(shape), dtype=dtype) for _ in range(2 * shape.layers)]
    return torch.ones(1, tokens, dtype=torch.int64), torch.arange(tokens), buffers


def concat_dims(layers, batch):
    rows = {0: "batch"} if batch else {}
    past = [rows | {2: "past_length"} for _ in range(2 * layers)]
    return rows | {1: "sequence_length"}, rows | {1: "total_length"}, rows | {1: "sequence_length"}, past


def save_dynamo(program, folder, external=False):
    """Write a dynamo export without the Python stack traces and FX text of its nodes.

    They name files of the exporting machine and are half of a small file. All other metadata stays.
    """
    dropped = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")
    proto = program.model_proto
    for node in proto.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key not in dropped]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    folder.mkdir(parents=True, exist_ok=True)
    if external:
        onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    else:
        onnx.save(proto, folder / "model.onnx")


# --- exporters -----------------------------------------------------------------------------------------------


def optimum(model, checkpoint, folder, shape, dtype="fp32", opset=None):
    from optimum.exporters.onnx import main_export

    scratch = folder.with_name(folder.name + ".optimum")
    main_export(
        str(checkpoint),
        output=str(scratch),
        task="text-generation-with-past",
        do_validation=False,
        dtype=dtype,
        opset=opset,
    )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(scratch / "model.onnx", folder)
    shutil.rmtree(scratch)
    return concat_form(shape.layers)


def optimum_fp16(model, checkpoint, folder, shape):
    return optimum(model, checkpoint, folder, shape, dtype="fp16")


def dynamo(model, checkpoint, folder, shape, opset, dtype=torch.float32, batch=True, external=False, optimize=True):
    wrapped = FlatPast(copy.deepcopy(model).to(dtype)).eval()
    example = concat_example(shape, dtype, batch=2 if batch else 1)
    program = torch.onnx.export(
        wrapped,
        example,
        dynamo=True,
        opset_version=opset,
        optimize=optimize,
        verbose=False,
        input_names=["input_ids", "attention_mask", "position_ids", *past_names(shape.layers)],
        output_names=["logits", *present_names(shape.layers)],
        dynamic_shapes=concat_dims(shape.layers, batch),
    )
    save_dynamo(program, folder, external)
    return concat_form(shape.layers)


def dynamo_dynamiccache(model, checkpoint, folder, shape):
    """A transformers DynamicCache given to the exporter as it is: outputs unnamed, no position_ids."""
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    ids, mask, _, buffers = concat_example(shape, torch.float32)
    cache = cache_utils.DynamicCache()
    for layer in range(shape.layers):
        cache.update(buffers[2 * layer], buffers[2 * layer + 1], layer)
    past = {0: "batch", 2: "past_length"}
    program = torch.onnx.export(
        model,
        (),
        kwargs={"input_ids": ids, "attention_mask": mask, "past_key_values": cache},
        dynamo=True,
        opset_version=18,
        verbose=False,
        dynamic_shapes={
            "input_ids": {0: "batch", 1: "sequence_length"},
            "attention_mask": {0: "batch", 1: "total_length"},
            "past_key_values": [[past] * shape.layers, [past] * shape.layers],
        },
    )
    save_dynamo(program, folder)
    graph = program.model_proto.graph
    logits, *present = [value.name for value in graph.output]
    inputs = [value.name for value in graph.input][2:]
    return CacheForm("concat", list(zip(inputs, present)), logits)


def dynamo_static(model, checkpoint, folder, shape, opset=18, write=index_put):
    wrapped = StaticPast(model, write).eval()
    program = torch.onnx.export(
        wrapped,
        static_example(shape, torch.float32),
        dynamo=True,
        opset_version=opset,
        verbose=False,
        input_names=["input_ids", "cache_position", *past_names(shape.layers)],
        output_names=["logits", *present_names(shape.layers)],
        dynamic_shapes=({1: "sequence_length"}, {0: "sequence_length"}, [{} for _ in range(2 * shape.layers)]),
    )
    save_dynamo(program, folder)
    return static_form(shape.layers)


def static_form(layers):
    return CacheForm("static", list(zip(past_names(layers), present_names(layers))), capacity=CAPACITY)


@contextlib.contextmanager
def masks_without_vmap():
    """transformers builds masks with vmap, which TorchScript traces to fixed lengths; optimum's builder it can trace."""
    from optimum.exporters.onnx.model_patcher import sdpa_mask_without_vmap
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    usual = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", sdpa_mask_without_vmap)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", usual)


def torchscript_static(model, checkpoint, folder, shape, write=index_copy, opset=17):
    folder.mkdir(parents=True, exist_ok=True)
    with masks_without_vmap():
        torch.onnx.export(
            StaticPast(model, write).eval(),
            static_example(shape, torch.float32),
            folder / "model.onnx",
            dynamo=False,
            opset_version=opset,
            input_names=["input_ids", "cache_position", *past_names(shape.layers)],
            output_names=["logits", *present_names(shape.layers)],
            dynamic_axes={"input_ids": {1: "sequence_length"}, "cache_position": {0: "sequence_length"}},
        )
    return static_form(shape.layers)


def torchscript_static_indexput(model, checkpoint, folder, shape):
    return torchscript_static(model, checkpoint, folder, shape, write=index_put_grid)


def in_transformers_5(*command, folder=None):
    python = os.environ.get("EXPORTKIT_T5_PYTHON")
    if not python:
        raise RuntimeError("EXPORTKIT_T5_PYTHON is not set: name a Python that has transformers 5")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run([python, *command], capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def ort_genai(model, checkpoint, folder, shape, precision="fp32", options=()):
    scratch = folder.with_name(folder.name + ".genai")
    in_transformers_5(
        *("-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(scratch), "-p", precision),
        *("-e", "cpu", "-c", str(scratch / "cache")),
        *(["--extra_options", *options] if options else []),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(scratch / name, folder)
    shutil.rmtree(scratch)
    return concat_form(shape.layers)


def ort_genai_fp16(model, checkpoint, folder, shape):
    return ort_genai(model, checkpoint, folder, shape, precision="fp16")


def mobius(checkpoint, folder, *options):
    scratch = folder.with_name(folder.name + ".mobius")
    # The path given becomes the name of the graph, so it is a relative one.
    in_transformers_5(
        *("-m", "mobius", "build", "--config", checkpoint.name, *options, str(scratch.absolute())),
        folder=checkpoint.parent,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for path in scratch.glob("model.onnx*"):
        shutil.copy(path, folder)
    shutil.rmtree(scratch)


def mobius_static(model, checkpoint, folder, shape, dtype="f32"):
    mobius(checkpoint, folder, "--static-cache", "--max-seq-len", str(CAPACITY), "--dtype", dtype)
    pairs = [(f"{k}_cache.{i}", f"updated_{k}_cache.{i}") for i in range(shape.layers) for k in ("key", "value")]
    return CacheForm("tensor-scatter", pairs, capacity=CAPACITY)


def mobius_concat(model, checkpoint, folder, shape):
    """The dynamic form: ONNX Attention with past_key and past_value."""
    mobius(checkpoint, folder)
    return concat_form(shape.layers)


EXPORTERS = {
    "optimum": optimum,
    "optimum-fp16": optimum_fp16,
    "dynamo-opset18": lambda *arguments: dynamo(*arguments, opset=18),
    "dynamo-opset23": lambda *arguments: dynamo(*arguments, opset=23),
    "dynamo-opset23-fp16": lambda *arguments: dynamo(*arguments, opset=23, dtype=torch.float16),
    "dynamo-dynamiccache": dynamo_dynamiccache,
    "dynamo-static": dynamo_static,
    "dynamo-static-opset23": lambda *arguments: dynamo_static(*arguments, opset=23),
    "torchscript-static": torchscript_static,
    "torchscript-static-indexput": torchscript_static_indexput,
    "ort-genai": ort_genai,
    "ort-genai-fp16": ort_genai_fp16,
    "mobius-static": mobius_static,
    "mobius": mobius_concat,
}
