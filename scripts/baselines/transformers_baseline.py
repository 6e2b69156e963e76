#!/usr/bin/env python3
"""Hugging Face transformers as a baseline: one mode a process, one result file (scripts/baselines/schema.py).

    transformers_baseline.py MODE --model FOLDER|made:SIZE --workload WORKLOAD.json -o RESULT.json

modes:
  reference       fp32, eager, no times: the logits and greedy tokens all systems are compared with; writes the tokens it
                  chose into the workload, so run it first
  eager           `generate`, SDPA attention, a cache that grows
  eager-flash     the same with FlashAttention 2, where it is installed
  static          `generate` over a static cache
  static-compile  `generate` over a static cache, which compiles the decode step (torch.compile, CUDA graphs)
  frozen          the bare compiled step with CUDA graphs over a static cache, nothing of `generate` around it
  frozen-flash    the same with torch's FlashAttention back end forced, which takes no mask: the cache is cut to its length, which
                  stays as it is while decode is timed. No end to end, where each length would be another graph

Decode, end to end and time to first token are wall clock to the token's id on the host; `generate` is timed at its
streamer. Static caches are kept and reset between runs, which is the best case for CUDA graphs. Exit status 2: the
input is unusable; a mode that cannot run here writes a file that says so and exits 0.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import outputs
import schema
from schema import Unusable, note

# Tokens decoded from one live length before the cache is filled again, so that the length drifts little.
RUN = 16
VARIANTS = {
    "reference": "fp32 reference",
    "eager": "eager, SDPA",
    "eager-flash": "eager, FlashAttention 2",
    "static": "static cache",
    "static-compile": "static cache, torch.compile",
    "frozen": "bare compiled step, CUDA graphs",
    "frozen-flash": "bare compiled step, CUDA graphs, FlashAttention",
}


class Clock:
    """A streamer that records when tokens arrive on the host."""

    def __init__(self):
        self.times, self.prompt_seen = [], False

    def put(self, _tokens):
        if self.prompt_seen:
            self.times.append(time.perf_counter())
        self.prompt_seen = True

    def end(self):
        pass


class Forced:
    """A logits processor that picks given tokens, whatever the logits say."""

    def __init__(self, tokens, start):
        self.tokens, self.start = tokens, start

    def __call__(self, ids, scores):
        token = self.tokens[min(ids.shape[1] - self.start, len(self.tokens) - 1)]
        scores = scores.new_full(scores.shape, float("-inf"))
        scores[:, token] = 0
        return scores


class Eager:
    """`generate` with a dynamic cache. The other modes change the cache and the step."""

    compiled = False

    def __init__(self, model, device, capacities):
        import torch

        self.torch, self.model, self.device, self.capacities = torch, model, device, capacities
        self.cache, self.capacity = None, None
        # Of the steps since the cache was emptied, by events of the GPU; `generate` has no place for them.
        self.device_ms = []

    def tensor(self, ids):
        return self.torch.tensor([ids], device=self.device)

    def make_room(self, _tokens):
        """Prepares an empty cache for this many tokens, outside of the timed part."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def prefill(self, ids):
        """The whole prompt in one call; the first token's id."""
        inputs = self.tensor(ids)
        out = self.model(inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def options(self):
        return {}

    def generate(self, ids, n, **options):
        inputs = self.tensor(ids)
        return self.model.generate(
            inputs, attention_mask=self.torch.ones_like(inputs), past_key_values=self.cache, max_new_tokens=n,
            do_sample=False, **self.options(), **options)  # fmt: skip

    def timed(self, ids, n, at_least=0):
        """Time to the first token and the gaps after it, in ms. The cache has room for `at_least` so many tokens."""
        self.make_room(max(at_least, len(ids) + n - 1))
        self.synchronize()
        clock, start = Clock(), time.perf_counter()
        self.generate(ids, n, streamer=clock)
        assert len(clock.times) == n
        marks = [start] + clock.times
        first, *gaps = [(b - a) * 1e3 for a, b in zip(marks, marks[1:])]
        return first, gaps

    def greedy(self, ids, n):
        self.make_room(len(ids) + n - 1)
        return self.generate(ids, n)[0, len(ids):].tolist()

    def logits(self, ids, forced):
        """Rows after the prompt and after each forced token but the last."""
        self.make_room(len(ids) + len(forced) - 1)
        out = self.generate(ids, len(forced), logits_processor=[Forced(forced, len(ids))], output_logits=True,
                            return_dict_in_generate=True)  # fmt: skip
        return [row[0].float().cpu().numpy() for row in out.logits]

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def cache_bytes(self, tokens):
        slots = self.capacity or tokens
        config = self.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        element = next(self.model.parameters()).element_size()
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * slots * element


class Static(Eager):
    """A static cache of the smallest capacity that fits, as Lapidary's sessions have it."""

    def make_room(self, tokens):
        from transformers import StaticCache

        capacity = next((c for c in self.capacities if c >= tokens), None)
        if capacity is None:
            raise Unusable(f"{tokens} tokens do not fit the largest capacity, {self.capacities[-1]}: see --capacity")
        if capacity == self.capacity:
            self.cache.reset()
            return
        self.capacity, self.cache = capacity, None
        if self.compiled:
            # Otherwise the second capacity would be compiled with a symbolic one, which is slower.
            self.torch._dynamo.reset()
            self.model.__dict__.pop("_compiled_call", None)
        self.cache = StaticCache(config=self.model.config, max_cache_len=capacity)

    def options(self):
        return {"disable_compile": True}


class StaticCompile(Static):
    compiled = True

    def options(self):
        from transformers import CompileConfig

        compile_config = CompileConfig(mode="reduce-overhead" if self.device == "cuda" else "default")
        compile_config._compile_all_devices = True
        return {"compile_config": compile_config}


class Frozen(Static):
    """A step that is one compiled function from token to token: model, argmax, nothing else."""

    compiled = True
    # Whether a timed step comes after the one before it, or at the same length: one graph.
    grows = True

    def make_room(self, tokens):
        before = self.capacity
        super().make_room(tokens)
        self.device_ms = []
        if before == self.capacity:
            return
        torch, model = self.torch, self.model
        self.token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self.position = torch.zeros((1, 1), dtype=torch.long, device=self.device)

        def step(cache, token, position):
            out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
            row = out.logits[0, -1].float()
            return row, row.argmax()

        mode = "reduce-overhead" if self.device == "cuda" else "default"
        self.compiled_step = torch.compile(step, mode=mode, fullgraph=True)

    def step(self, token, position):
        """The row of logits, on the device, and the next token's id."""
        # The previous step's result may be overwritten.
        self.torch.compiler.cudagraph_mark_step_begin()
        self.token.fill_(token)
        self.position.fill_(position)
        if self.device != "cuda":
            row, best = self.compiled_step(self.cache, self.token, self.position)
            return row, int(best)
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        row, best = self.compiled_step(self.cache, self.token, self.position)
        end.record()
        best = int(best)
        self.device_ms.append(begin.elapsed_time(end))
        return row, best

    def timed(self, ids, n, at_least=0):
        self.make_room(max(at_least, len(ids) + n - 1))
        self.synchronize()
        marks = [time.perf_counter()]
        token = self.prefill(ids)
        marks.append(time.perf_counter())
        for i in range(n - 1):
            token = self.step(token, len(ids) + (i if self.grows else 0))[1]
            marks.append(time.perf_counter())
        first, *gaps = [(b - a) * 1e3 for a, b in zip(marks, marks[1:])]
        return first, gaps

    def greedy(self, ids, n):
        self.make_room(len(ids) + n - 1)
        tokens = [self.prefill(ids)]
        while len(tokens) < n:
            tokens.append(self.step(tokens[-1], len(ids) + len(tokens) - 1)[1])
        return tokens

    def logits(self, ids, forced):
        self.make_room(len(ids) + len(forced) - 1)
        out = self.model(self.tensor(ids), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        rows = [out.logits[0, -1].float().cpu().numpy()]
        for i, token in enumerate(forced[:-1]):
            rows.append(self.step(token, len(ids) + i)[0].cpu().numpy())
        return rows


class FrozenFlash(Frozen):
    """A step over a cache that is cut to its length, so that attention needs no mask and FlashAttention supports it."""

    grows = False

    def __init__(self, model, *arguments):
        super().__init__(model, *arguments)
        # One token sees the whole cache and a prompt is causal, but while a step is compiled transformers makes a mask for both.
        module = sys.modules[type(model.model).__module__]
        if not hasattr(module, "create_causal_mask"):
            raise Unusable(f"{module.__name__} makes its mask in another way than frozen-flash knows")
        module.create_causal_mask = lambda *_, **__: None

    def make_room(self, tokens):
        import sliced_cache

        capacity = next((c for c in self.capacities if c >= tokens), None)
        if capacity is None:
            raise Unusable(f"{tokens} tokens do not fit the largest capacity, {self.capacities[-1]}: see --capacity")
        self.device_ms = []
        if capacity == self.capacity:
            self.cache.length = 0
            return
        torch, model = self.torch, self.model
        torch._dynamo.reset()
        parameter = next(model.parameters())
        self.capacity, self.cache = capacity, None
        self.cache = sliced_cache.SlicedCache(model.config, capacity, parameter.device, parameter.dtype)
        self.token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self.position = torch.zeros((1, 1), dtype=torch.long, device=self.device)

        def step(cache, token, position):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
            row = out.logits[0, -1].float()
            return row, row.argmax()

        self.plain_step = step
        mode = "reduce-overhead" if self.device == "cuda" else "default"
        self.compiled_step = torch.compile(step, mode=mode, fullgraph=True, dynamic=False)

    def prefill(self, ids):
        with self.torch.nn.attention.sdpa_kernel(self.torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            token = super().prefill(ids)
        self.cache.length = len(ids)
        return token

    def after(self, ids, tokens):
        """The row of logits after each token that `tokens` gives for the row before it, uncompiled, the length growing."""
        self.make_room(len(ids) + len(tokens))
        with self.torch.nn.attention.sdpa_kernel(self.torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = self.model(self.tensor(ids), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache.length = len(ids)
        rows = [out.logits[0, -1].float()]
        for choose in tokens:
            self.token.fill_(choose(rows[-1]))
            self.position.fill_(self.cache.length)
            rows.append(self.plain_step(self.cache, self.token, self.position)[0])
            self.cache.length += 1
        return rows

    def greedy(self, ids, n):
        best = lambda row: int(row.argmax())  # noqa: E731
        return [best(row) for row in self.after(ids, [best] * (n - 1))]

    def logits(self, ids, forced):
        given = [lambda _, token=token: token for token in forced[:-1]]
        return [row.cpu().numpy() for row in self.after(ids, given)]


MODES = {"eager": Eager, "eager-flash": Eager, "static": Static, "static-compile": StaticCompile, "frozen": Frozen,
         "frozen-flash": FrozenFlash}  # fmt: skip


def reference(model, ids, n, device):
    """Greedy tokens of a plain loop, and the row of logits each was chosen from."""
    import torch
    from transformers import DynamicCache

    cache, tokens, rows = DynamicCache(config=model.config), [], []
    inputs = torch.tensor([ids], device=device)
    while len(tokens) < n:
        row = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()
        rows.append(row.cpu().numpy())
        tokens.append(int(row.argmax()))
        inputs = torch.tensor([tokens[-1:]], device=device)
    return tokens, rows


def document(arguments, model_facts, workload, device, settings):
    import hugging_face

    # The reference measures the machine in the dtype that is compared; systems without torch use these figures.
    machine = hugging_face.machine(device, arguments.dtype, arguments.threads)
    variant = VARIANTS[arguments.mode]
    label = arguments.label or f"transformers {variant}"
    return schema.Document(arguments.output, "transformers", variant, label, model_facts, machine, hugging_face.versions(),
                           outputs.identities(workload), workload["seed"], settings)  # fmt: skip


def write_reference(model, model_facts, arguments, workload, device):
    """The reference's result file, and its tokens into the workload. `model` is already fp32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    result = document(arguments, model_facts, workload, device, {"attention": "sdpa", "tf32": False})
    greedy, rows = [], []
    with torch.no_grad():
        for i, ids in enumerate(workload["prompts"]):
            tokens, found = reference(model, ids, outputs.GREEDY, device)
            greedy.append(tokens)
            rows += [outputs.row(i, step, row) for step, row in enumerate(found)]
            note("reference", f"{len(ids)} tokens")
    result["outputs"] = {"prompts": workload["prompts"], "greedy_tokens": greedy, "logits": rows, "reference": None}
    result.finish()
    schema.write(arguments.workload, workload | {"forced": greedy})
    return result


def outputs_of(mode, workload, forced, dtype, reference):
    greedy = [mode.greedy(ids, outputs.GREEDY) for ids in workload["prompts"]]
    rows = []
    for i, (ids, tokens) in enumerate(zip(workload["prompts"], forced or [[t[0]] for t in greedy])):
        rows += [outputs.row(i, step, row) for step, row in enumerate(mode.logits(ids, tokens))]
    found = {"prompts": workload["prompts"], "greedy_tokens": greedy, "logits": rows, "reference": None}
    if reference:
        found["reference"] = outputs.compare(found, dtype, reference)
        note("outputs", outputs.summary_line(found["reference"]))
    return found


def measure(mode, result, arguments, workload, reference):
    """Outputs first, then times, from the smallest cache to the largest: a compiled mode compiles once for each."""
    sizes = []
    for live in arguments.live:
        sizes.append((live + RUN, "decode", live))
    for prompt, new in arguments.end_to_end:
        sizes.append((prompt + new - 1, "end_to_end", (prompt, new)))
    for tokens in arguments.prefill:
        sizes.append((tokens, "prefill", tokens))
    if isinstance(mode, Static):
        room = lambda tokens: next((i for i, c in enumerate(mode.capacities) if c >= tokens), len(mode.capacities))
        # What needs little room uses the capacity that the longest prompt for outputs has: fewer compilations.
        least = room(max(map(len, workload["prompts"])) + outputs.GREEDY - 1)
        mode.capacities = mode.capacities[least:]
        sizes.sort(key=lambda size: room(size[0]))
    if mode.device == "cuda":
        mode.torch.cuda.empty_cache()
        mode.torch.cuda.reset_peak_memory_stats()
    warm(mode, result, workload, 1)
    if arguments.outputs:
        result["outputs"] = outputs_of(mode, workload, workload.get("forced"), arguments.dtype, reference)
    for tokens, what, case in sizes:
        warm(mode, result, workload, tokens)
        if what == "decode":
            ids, samples, on_gpu = outputs.timed(workload, case), [], []
            mode.timed(ids, RUN + 1)  # see below
            for _ in range(max(1, arguments.decode_samples // RUN)):
                samples += mode.timed(ids, RUN + 1)[1]
                on_gpu += mode.device_ms
            result.decode(case, mode.capacity, samples, statistics.median(on_gpu) if on_gpu else None)
        elif what == "end_to_end":
            prompt, new = case
            ids = outputs.timed(workload, prompt)
            # The first step at any length of a growing cache took 35 ms more on an H200, the second time none of it: attention's
            # kernels are planned for each shape. What a process pays once for each length is not what a step takes.
            mode.timed(ids, new)
            result.end_to_end(prompt, new, [mode.timed(ids, new) for _ in range(arguments.runs)])
        else:
            ids, samples = outputs.timed(workload, case), []
            for _ in range(arguments.prefill_samples + 2):
                mode.make_room(case)
                mode.synchronize()
                start = time.perf_counter()
                mode.prefill(ids)
                samples.append((time.perf_counter() - start) * 1e3)
            result.prefill(case, samples[2:])


def warm(mode, result, workload, tokens):
    """Runs until nothing compiles any more: the first two runs at a capacity compile."""
    before = mode.capacity
    mode.make_room(tokens)
    if mode.compiled and mode.capacity == before:
        return
    start = time.perf_counter()
    ids = outputs.timed(workload, min(16, len(workload["timed"])))
    for _ in range(3 if mode.compiled else 1):
        mode.timed(ids, 8, mode.capacity or 0)
    if mode.compiled:
        seconds = result.values["system"]["settings"].setdefault("compile_s", {})
        seconds[str(mode.capacity)] = round(time.perf_counter() - start, 2)
        note("compiled for", mode.capacity, "slots in", seconds[str(mode.capacity)], "s")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=VARIANTS)
    parser.add_argument("--model", required=True, help="a Hugging Face folder, or made:SIZE")
    parser.add_argument("--model-name", help="in the result; default: from --model")
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="the reference's result; without it outputs are not compared")
    parser.add_argument("--weights-hash", help="refuse other weights")
    parser.add_argument("--outputs", type=int, default=1, choices=[0, 1], help="0: times only")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all cores")
    parser.add_argument("--label", help="in tables")
    parser.add_argument("--capacity", type=schema.numbers, default=[256, 1024, 4096], help="of static caches")
    parser.add_argument("--prefill", type=schema.numbers, default=[128, 512], metavar="N,N")
    parser.add_argument("--live", type=schema.numbers, default=[300, 4080], metavar="N,N", help="tokens in the cache before a decode run of 16")
    parser.add_argument("--end-to-end", type=schema.pairs, default=[(128, 512)], metavar="PROMPT:NEW,…")
    parser.add_argument("--runs", type=int, default=4, help="end to end")
    parser.add_argument("--prefill-samples", type=int, default=12)
    parser.add_argument("--decode-samples", type=int, default=64)
    return parser.parse_args()


def run(given):
    import os

    given.threads = given.threads or os.cpu_count()
    workload = outputs.read_workload(given.workload)
    variant = VARIANTS[given.mode]
    label = given.label or f"transformers {variant}"
    if given.mode == "eager-flash" and importlib.util.find_spec("flash_attn") is None:
        schema.failed(given.output, "transformers", variant, label, "the package flash_attn is not installed here",
                      like=given.reference, dtype=given.dtype)  # fmt: skip
        return 0
    import torch

    import hugging_face

    torch.set_num_threads(given.threads)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    attention = "flash_attention_2" if given.mode == "eager-flash" else "sdpa"
    if given.mode == "reference":
        # Made in the dtype that is compared, widened after: the same numbers.
        model, name, _ = hugging_face.load(given.model, given.dtype, device, attention)
        model.float()
        facts = hugging_face.facts(model, given.model, given.model_name or name, "fp32", given.weights_hash)
        write_reference(model, facts, given, workload, device)
        return 0
    context = hugging_face.used_bytes() if device == "cuda" else None
    model, name, load_ms = hugging_face.load(given.model, given.dtype, device, attention)
    facts = hugging_face.facts(model, given.model, given.model_name or name, given.dtype, given.weights_hash)
    compared = outputs.reference_of(given.reference, facts.weights_hash) if given.reference else None
    mode = MODES[given.mode](model, device, given.capacity)
    if isinstance(mode, FrozenFlash):
        given.end_to_end, attention = [], "sdpa, FlashAttention"
    settings = {"attention": attention, "cache": "static" if isinstance(mode, Static) else "dynamic",
                "cuda_graphs": device == "cuda" and mode.compiled, "torch_compile": mode.compiled,
                "threads": given.threads if device == "cpu" else None}  # fmt: skip
    result = document(given, facts, workload, device, settings)
    result.loaded(load_ms)
    try:
        with torch.no_grad():
            measure(mode, result, given, workload, compared)
    except Unusable:
        raise
    except Exception as error:  # noqa: BLE001 - what cannot run is a result, and the words are in it
        # An incomplete result is not written: earlier measurements stay in the log.
        result.values |= {"prefill": [], "decode": [], "end_to_end": [], "outputs": None}
        result["error"] = f"{type(error).__name__}: {error}"[:2000]
        note(label, "broke off:", result.values["error"])
        result.finish()
        return 0
    if device == "cuda" and mode.compiled and torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]:
        system = result.values["system"]
        system["settings"]["cuda_graphs"] = False
        for key in ("variant", "label"):
            system[key] = system[key].replace("CUDA graphs", "torch skipped CUDA graphs")
    if device == "cuda":
        longest = max([*(n + RUN for n in given.live), *(p + n for p, n in given.end_to_end)], default=0)
        result.values["memory"]["device"] = hugging_face.device_memory(model, mode.cache_bytes(longest), context)
    result.finish()
    return 0


def main():
    try:
        return run(arguments())
    except (Unusable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
