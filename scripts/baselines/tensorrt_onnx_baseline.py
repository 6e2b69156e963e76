#!/usr/bin/env python3
"""TensorRT-RTX with its own ONNX parser as a baseline: its usual path, which Lapidary does not use.

    tensorrt_onnx_baseline.py MODEL.onnx --workload WORKLOAD.json -o RESULT.json        on a GPU
    tensorrt_onnx_baseline.py --verdicts VERDICTS.json EXPORT.onnx…                     parses and builds, needs no GPU

The export keeps its growing caches. One engine with two optimization profiles, a prompt behind an empty cache and one
token behind a cache of any length; past and present lie in two sets of device buffers that change places after each token,
bound by address. Each token has other shapes, so there is nothing to capture in a CUDA graph; how the kernels of dynamic
shapes are specialized is --specialization. An export that the parser or the builder refuses gives a result file with the
words. Needs torch, the wheel tensorrt-rtx-cu12-bindings, and both libraries of tensorrt-rtx-cu12-libs: TENSORRT_RTX_LIB
names the one, the other lies beside it.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import schema
import stepwise
from schema import Unusable, note
from stepwise import Refused

PARSER_LIBRARY = "libtensorrt_onnxparser_rtx.so.1"


def tensorrt():
    """The bindings, which do not find their libraries by themselves when these are not installed as a package."""
    path = os.environ.get("TENSORRT_RTX_LIB")
    # True fp32 here too: TensorRT-RTX uses this variable and not its builder's flag.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if not path:
        raise Unusable("TENSORRT_RTX_LIB is not set: it names libtensorrt_rtx.so.1")
    for library in (Path(path), Path(path).with_name(PARSER_LIBRARY)):
        if not library.is_file():
            raise Unusable(f"{library}: no such file; the wheel tensorrt-rtx-cu12-libs has it")
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    try:
        import tensorrt_rtx_bindings
    except ImportError as error:
        raise Unusable(f"{error}: run\n    pip install --no-deps tensorrt-rtx-cu12-bindings==1.6.1.120") from error
    return tensorrt_rtx_bindings


def logger_of(trt):
    class Logger(trt.ILogger):
        """Collects errors; prints nothing."""

        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors = []

        def log(self, severity, message):
            # Without a driver every builder first logs CUDA error 35.
            if severity <= trt.ILogger.Severity.ERROR and "cudaError 35" not in message:
                self.errors.append(message.strip())

        def words(self):
            unique = list(dict.fromkeys(self.errors))
            self.errors = []
            return "; ".join(unique)[:1500]

    return Logger()


class Built:
    """An export parsed and built: the plan, and what its inputs are."""

    def __init__(self, trt, path, longest_prompt, slots):
        self.logger = logger_of(trt)
        start = time.perf_counter()
        builder = trt.Builder(self.logger)
        network = builder.create_network(0)  # strongly typed, the only mode
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(path)):
            raise Refused("the parser: " + parser_words(parser, self.logger))
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        self.shapes = {tensor.name: list(tensor.shape) for tensor in inputs}
        self.caches = [name for name in self.shapes if name.startswith("past")]
        known = {"input_ids", "attention_mask", "position_ids", "cache_position"}
        if set(self.shapes) - set(self.caches) - known or not self.caches:
            raise Refused(f"parsed, but its inputs are none that this script binds: {sorted(self.shapes)[:6]}…")
        self.grows = self.shapes[self.caches[0]][2] == -1
        self.outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        config = builder.create_builder_config()
        prompt = min(128, longest_prompt)
        for tokens, past in (((1, prompt, longest_prompt), (0, 0, 0)), ((1, 1, 1), (1, slots // 2, slots - 1))):
            profile = builder.create_optimization_profile()
            for name in self.shapes:
                profile.set_shape(name, *(self.shape(name, t, p) for t, p in zip(tokens, past)))
            config.add_optimization_profile(profile)
        self.layers, self.parse_ms = network.num_layers, (time.perf_counter() - start) * 1e3
        start = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise Refused("the builder: " + (self.logger.words() or "no reason given"))
        self.plan, self.build_ms = plan, (time.perf_counter() - start) * 1e3

    def shape(self, name, tokens, past):
        """Of an input; what the export fixes stays as it is."""
        wanted = [past + tokens if name == "attention_mask" else tokens]
        if name in self.caches:
            wanted = [0, past, 0]
        ones = [1] * (len(self.shapes[name]) - len(wanted))
        return tuple(fixed if fixed != -1 else free for fixed, free in zip(self.shapes[name], ones + wanted))


def parser_words(parser, logger):
    words = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        words.append(f"node {error.node_name()} ({error.node_operator()}): {error.desc()}")
    return "; ".join(dict.fromkeys(words))[:1500] or logger.words() or "no reason given"


class Decoder:
    """Two contexts of one engine, two sets of caches."""

    def __init__(self, trt, path, longest_prompt, slots, specialization):
        import hugging_face
        import torch

        self.used_bytes = hugging_face.used_bytes
        self.torch, self.built = torch, Built(trt, path, longest_prompt, slots)
        built = self.built
        if not built.grows or "cache_position" in built.shapes:
            raise Refused("parsed and built, but this baseline runs exports with growing caches only")
        note(f"parsed in {built.parse_ms:.0f} ms, built in {built.build_ms / 1e3:.1f} s, {built.plan.nbytes / 1e6:.0f} MB")
        start = time.perf_counter()
        self.context_bytes = self.used_bytes()
        self.runtime = trt.Runtime(built.logger)
        self.engine = self.runtime.deserialize_cuda_engine(built.plan)
        if self.engine is None:
            raise Refused("loading the engine: " + built.logger.words())
        config = self.engine.create_runtime_config()
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, specialization.upper())
        self.stream = torch.cuda.Stream()
        self.contexts = []
        for profile in range(2):
            context = self.engine.create_execution_context(config)
            if context is None or not context.set_optimization_profile_async(profile, self.stream.cuda_stream):
                raise Refused("making a context: " + built.logger.words())
            self.contexts.append(context)
        kinds = {trt.DataType.HALF: (torch.float16, "fp16"), trt.DataType.FLOAT: (torch.float32, "fp32"),
                 trt.DataType.BF16: (torch.bfloat16, "bf16")}  # fmt: skip
        kind, self.dtype = kinds[self.engine.get_tensor_dtype(built.caches[0])]
        sets = lambda name: [torch.empty(built.shape(name, 1, slots), dtype=kind, device="cuda") for _ in range(2)]
        self.caches = {name: sets(name) for name in built.caches}
        self.present = {name: name.replace("past_key_values", "present") for name in built.caches}
        missing = [name for name in (*self.present.values(), "logits") if name not in built.outputs]
        if missing:
            raise Refused(f"parsed, but has no output {missing[0]}")
        whole = {"input_ids": longest_prompt, "position_ids": longest_prompt, "attention_mask": slots}
        self.integers = {name: torch.ones(n, dtype=self.integer(name, trt), device="cuda")
                         for name, n in whole.items() if name in built.shapes}  # fmt: skip
        vocabulary = self.engine.get_tensor_shape("logits")[-1]
        logits = kinds[self.engine.get_tensor_dtype("logits")][0]
        self.logits = torch.empty((longest_prompt, vocabulary), dtype=logits, device="cuda")
        torch.cuda.synchronize()
        self.load_ms = (time.perf_counter() - start) * 1e3
        self.reset()

    def integer(self, name, trt):
        kind = self.engine.get_tensor_dtype(name)
        return self.torch.int64 if kind == trt.DataType.INT64 else self.torch.int32

    def reset(self):
        self.length, self.turn = 0, 0

    def run(self, ids):
        """Queues one run over all of `ids`; gives the row of logits after the last, on the device."""
        torch, context, n = self.torch, self.contexts[self.length > 0], len(ids)
        with torch.cuda.stream(self.stream):
            kind = self.integers["input_ids"].dtype
            self.integers["input_ids"][:n].copy_(torch.tensor(ids, dtype=kind).pin_memory(), non_blocking=True)
            if "position_ids" in self.integers:
                position = self.integers["position_ids"]
                torch.arange(self.length, self.length + n, dtype=position.dtype, device="cuda", out=position[:n])
            for name, values in self.integers.items():
                context.set_input_shape(name, self.built.shape(name, n, self.length))
                context.set_tensor_address(name, values.data_ptr())
            for name, sets in self.caches.items():
                context.set_input_shape(name, self.built.shape(name, n, self.length))
                context.set_tensor_address(name, sets[self.turn].data_ptr())
                context.set_tensor_address(self.present[name], sets[1 - self.turn].data_ptr())
            context.set_tensor_address("logits", self.logits.data_ptr())
            if not context.execute_async_v3(self.stream.cuda_stream):
                raise RuntimeError("TensorRT: " + self.built.logger.words())
            self.length, self.turn = self.length + n, 1 - self.turn
            return self.logits[n - 1]

    def feed(self, ids):
        row = self.run(ids)
        self.stream.synchronize()
        return row.float().cpu().numpy()

    def step(self, ids):
        start = time.perf_counter()
        row = self.run(ids)
        with self.torch.cuda.stream(self.stream):
            token = int(row.argmax())
        return (time.perf_counter() - start) * 1e3, token

    def facts(self):
        """Read at the end: no memory is freed before."""
        built = self.built
        plan = {"profile": "prompt; one token behind any cache", "bytes": built.plan.nbytes, "build_ms": built.build_ms}
        cache = sum(t.numel() * t.element_size() for sets in self.caches.values() for t in sets)
        return {"build": {"engines": [plan]}, "sizes": {"plans_bytes": built.plan.nbytes},
                "memory": {"device": {"weights": None, "cache": cache, "scratch": None, "context": self.context_bytes,
                                      "total": self.used_bytes()}}}  # fmt: skip


def verdict(path):
    """The messages of the parser and the builder for one export."""
    try:
        built = Built(tensorrt(), path, 64, 128)
        return {"taken": True, "cache": "grows" if built.grows else "static", "layers": built.layers, "build_ms": round(built.build_ms), "plan_bytes": built.plan.nbytes}
    except Refused as refused:
        return {"taken": False, "words": str(refused)}


def verdicts(given):
    """For all exports, each in its own process: some crash it."""
    version, found = tensorrt().__version__, []
    for path in given.exports:
        command = [sys.executable, __file__, "--verdict", path]
        done = subprocess.run(command, capture_output=True, text=True)
        ended = {"taken": False, "words": f"the process ended with {done.returncode}: {done.stderr.strip()[-600:]}"}
        outcome = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else ended
        found.append({"export": path.parent.name} | outcome)
        note(path.parent.name, "taken" if outcome["taken"] else outcome["words"][:160])
    values = {"what": "exports given to TensorRT-RTX's own ONNX parser and builder, profiles of up to 64 prompt tokens and 128 slots",
              "tensorrt": version, "command": schema.command_line(), "commit": schema.commit(),
              "taken": sum(entry["taken"] for entry in found), "of": len(found), "exports": found}  # fmt: skip
    given.verdicts.write_text(json.dumps(values, indent=1) + "\n")
    return 0


def measured(given):
    trt = tensorrt()
    import torch

    if not torch.cuda.is_available():
        raise Unusable("running engines needs a GPU; --verdicts parses and builds without one")
    import hugging_face

    ends = [n + stepwise.RUN for n in given.live] + [a + b for a, b in given.end_to_end]
    prompts = [len(ids) + 32 for ids in json.loads(given.workload.read_text())["prompts"]]
    longest = max([*given.prefill, *given.live, *(a for a, _ in given.end_to_end), *prompts])
    slots = max([*ends, *prompts, longest]) + 1
    settings = {"export": given.export or given.model.parent.name, "cache": "grows by one slot a token, two sets of buffers",
                "specialization": given.specialization, "cuda_graphs": False, "weights": "embedded", "tf32": False}  # fmt: skip
    versions = {"tensorrt": trt.__version__, "torch": torch.__version__, "cuda": torch.version.cuda,
                "python": platform.python_version()}  # fmt: skip
    variant = f"{settings['export']} export, {given.specialization} specialization"
    given.label = given.label or f"TensorRT's ONNX parser, {variant}"
    machine = lambda threads: hugging_face.machine("cuda", "fp16", threads)
    open_decoder = lambda model, _: Decoder(trt, model, longest, slots, given.specialization)
    return stepwise.measure(given, open_decoder, "tensorrt-onnx-parser", variant, versions, machine, settings)


def main():
    if sys.argv[1:2] == ["--verdict"]:
        print(json.dumps(verdict(Path(sys.argv[2]))))
        return 0
    if "--verdicts" in sys.argv:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--verdicts", type=Path, required=True)
        parser.add_argument("exports", type=Path, nargs="+")
        return stepwise.ended(verdicts, parser.parse_args())
    parser = stepwise.parser(__doc__)
    parser.add_argument("--export", help="what the export is called in tables; default: its folder")
    parser.add_argument("--specialization", choices=["lazy", "eager", "none"], default="lazy")
    return stepwise.ended(measured, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
