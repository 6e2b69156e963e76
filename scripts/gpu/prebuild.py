#!/usr/bin/env python3
"""Plans of made models, built on this machine, which needs neither a GPU nor the weights: bound engines hold none.

    scripts/gpu/prebuild.py SIZE PLANS [convert's flags…]        e.g. 8b .gpu/plans/llama-8b --capacity 256,1024,4096

Writes the export that make_model.py writes, without its data, and converts it with `--without-weights` into an engine cache
that `lapidary convert --engine-cache` on a GPU host finds again. Needs torch and transformers, but no memory for the model.
With `--conversion FILE` instead of PLANS nothing is taken from a cache, and FILE records what the conversion did and how long
each engine took: what `lapidary report --package` reads.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import make_model

ROOT = Path(__file__).resolve().parent.parent.parent


class GraphAlone(make_model.Export):
    """Initializers say where their data would be; nothing is written there. Tables, which the passes look into, are inline."""

    def weight(self, name, values):
        if isinstance(values, np.ndarray):
            return self.small(name, values)
        tensor = make_model.TensorProto(name=name, data_type=self.element, dims=list(values.shape))
        tensor.data_location = make_model.TensorProto.EXTERNAL
        size = 2 if self.element == make_model.TensorProto.FLOAT16 else 4
        length = size
        for dim in values.shape:
            length *= dim
        offset = -(-self.position // 4096) * 4096
        for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.position = offset + length
        return name


def main():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size, plans, *flags = sys.argv[1:]
    record = None
    if plans == "--conversion":
        record, *flags = flags
    facts = dict(make_model.SIZES[size])
    theta = facts.pop("rope_theta")
    config = LlamaConfig(**facts, max_position_embeddings=make_model.POSITIONS[size], tie_word_embeddings=False,
                         rope_theta=theta)
    if getattr(config, "rope_parameters", None) is not None:
        config.rope_parameters["rope_theta"] = theta
    torch.set_default_dtype(torch.float16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    make_model.Export = GraphAlone
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_model.export(model, folder, make_model.POSITIONS[size])
        (folder / "model.onnx.data").unlink()
        # The report calls a model what its package's folder is called.
        lapidary, package = ROOT / "target/release/lapidary", folder / f"llama-{size}"
        cache = [] if record else ["--engine-cache", plans]
        subprocess.run([lapidary, "convert", folder / "model.onnx", "-o", package, "--without-weights", "--target", "tensorrt-rtx",
                        *cache, *flags], check=True)  # fmt: skip
        if record:
            Path(record).write_text(subprocess.run([lapidary, "info", package, "--conversion"], check=True, stdout=subprocess.PIPE,
                                                 text=True).stdout)  # fmt: skip


if __name__ == "__main__":
    main()
