#!/usr/bin/env python3
"""ONNX Runtime GenAI as a baseline: a folder that its model builder made, on the provider that the builder wrote for.

    python3 -m onnxruntime_genai.models.builder -i CHECKPOINT -o FOLDER -p fp16|int4 -e cuda -c CACHE
    ort_genai_baseline.py FOLDER/model.onnx --checkpoint CHECKPOINT --workload WORKLOAD.json -o RESULT.json

The cache of keys and values is one buffer of --capacity slots that past and present share, and with --graph decode steps run as
a CUDA graph: the fastest settings that it has. Times are wall clock to the next token's id on the host, greedy. Weights are
hashed from the checkpoint; an int4 folder holds them rounded, which its label says. Exit status 2: the folder or the
workload is unusable.
"""

import json
import platform
import sys
import time
from pathlib import Path

import numpy as np

import outputs
import schema
import stepwise
from schema import Unusable


def genai():
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise Unusable(f"{error}: pip install onnxruntime-genai-cuda (or onnxruntime-genai for the CPU)") from error
    return onnxruntime_genai


def types_of(model):
    """The dtype of caches, and the bits of weights: those of codes where products read codes."""
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    dtypes = {names.get(value.type.tensor_type.elem_type) for value in graph.input} - {None}
    if len(dtypes) != 1:
        raise Unusable(f"{model}: its inputs have no caches of one type")
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    bits = {attribute.i for node in products for attribute in node.attribute if attribute.name == "bits"}
    dtype = dtypes.pop()
    return dtype, min(bits, default=32 if dtype == "fp32" else 16)


class Decoder:
    """A generator of one sequence. A new one for each prompt: it gives memory back, and its cache is the model's."""

    def __init__(self, folder, capacity, graph):
        self.genai, self.capacity = genai(), capacity
        settings = json.loads((folder / "genai_config.json").read_text())
        providers = settings["model"]["decoder"]["session_options"]["provider_options"]
        for options in (options for provider in providers for options in provider.values()):
            options["enable_cuda_graph"] = "1" if graph else "0"
        settings["search"]["past_present_share_buffer"] = bool(providers)
        (folder / "genai_config.json").write_text(json.dumps(settings, indent=1))
        self.model = self.genai.Model(str(folder))
        self.dtype, _ = types_of(folder / "model.onnx")
        self.reset()

    def reset(self):
        self.generator = None
        parameters = self.genai.GeneratorParams(self.model)
        # A minimum keeps it from stopping at an end token.
        parameters.set_search_options(do_sample=False, batch_size=1, max_length=self.capacity, min_length=self.capacity)
        self.generator = self.genai.Generator(self.model, parameters)
        self.fed, self.chosen = 0, None

    def feed(self, ids):
        """The logits after the last of `ids`."""
        self.generator.append_tokens(np.array(ids, np.int32))
        return np.array(self.generator.get_logits()).reshape(-1)

    def step(self, ids):
        """Milliseconds to the next token's id, and the id. After the prompt `ids` are what it chose itself."""
        if self.chosen is not None and list(ids) != [self.chosen]:
            raise Unusable("a step goes on from the token that was chosen")
        start = time.perf_counter()
        if self.chosen is None:
            self.generator.append_tokens(np.array(ids, np.int32))
        self.generator.generate_next_token()
        self.chosen = int(self.generator.get_next_tokens()[0])
        return (time.perf_counter() - start) * 1e3, self.chosen


def machine(given):
    if not given.graph and not given.cuda:
        return stepwise.cpu

    def of_gpu(threads):
        import hugging_face

        return hugging_face.machine("cuda", "fp16", threads)

    return of_gpu


def main():
    parser = stepwise.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the Hugging Face folder that the builder read")
    parser.add_argument("--capacity", type=int, default=4096, help="slots of the shared cache")
    parser.add_argument("--cuda", action="store_true", help="the folder is of the CUDA provider")
    parser.add_argument("--graph", action="store_true", help="CUDA graphs for decode steps; means --cuda")
    given = parser.parse_args()

    def measured():
        versions = {"onnxruntime-genai": genai().__version__, "python": platform.python_version()}
        variant = "ONNX Runtime GenAI" + (", CUDA graph" if given.graph else "")
        _, bits = types_of(given.model)
        if bits < 16:
            variant += f", int{bits} weights"
        settings = {"capacity": given.capacity, "cuda_graph": given.graph, "weight_bits": bits}
        workload = outputs.read_workload(given.workload)
        longest = max([*given.prefill, *given.live, *(prompt + new for prompt, new in given.end_to_end)])
        if longest + stepwise.RUN + 1 > given.capacity or not workload["prompts"]:
            raise Unusable(f"{longest} tokens and those after them need a larger --capacity than {given.capacity}")
        open_decoder = lambda model, _threads: Decoder(model.parent, given.capacity, given.graph)  # noqa: E731
        return stepwise.measure(given, open_decoder, "onnxruntime-genai", variant, versions, machine(given), settings,
                                given.checkpoint)  # fmt: skip

    return stepwise.ended(measured)


if __name__ == "__main__":
    sys.exit(main())
