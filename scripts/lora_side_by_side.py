#!/usr/bin/env python3
"""LoRA adapters of SmolLM2-135M on the CPU: applied at run time beside merged into the weights.

    scripts/smollm2_weights.py
    scripts/lora_side_by_side.py LAPIDARY [--ranks 8,16,64] [--rounds 5] [--clients 4] [--output FILE]

"Run time" is the export with two thin products and an addition beside each of the 210 linear modules, x W + (x A) B, converted like any
other. "Merged" is the package of the plain export with the same adapter merged by `refit --lora`. Both have fp16 weights; the
script stops if their greedy tokens differ early. Each round runs every package once, in turn: a prompt of 128 tokens,
64 new ones. Processor time (per token: a run with 64 tokens minus a run with one) is more reliable than wall-clock time
on a busy machine.

Then --clients clients at a time ask a server for 128:32 tokens each: of as many merged adapters (`serve --adapter`; each has steps of its
own), and of one package with thin products in it, which is what requests of several adapters that share their steps would cost at best.
Memory is what the server holds after that. Needs numpy and onnx.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from serve_soak import Server, events, give

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "fixtures" / "smollm2"
PROMPT, NEW, SERVED = 128, 64, 32
MEASURES = ["ttft_ms", "tpot_ms", "processor_first_ms", "processor_ms"]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def low_rank(model, rank, seed):
    """A and B of each linear module by its name, small enough that the model still writes text."""
    random = np.random.default_rng(seed)
    sizes = {value.name: list(value.dims) for value in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        name = node.name.removesuffix("/MatMul")
        if node.op_type == "MatMul" and name.rsplit("/", 1)[-1] in MODULES:
            depth, width = sizes[node.input[1]]
            a = random.normal(0, depth**-0.5, (depth, rank)).astype(np.float16)
            b = random.normal(0, 0.02 * rank**-0.5, (rank, width)).astype(np.float16)
            found[name] = (node, a, b)
    return found


def with_branches(rank, folder):
    """The export with products of the adapter beside its own."""
    model = onnx.load(FIXTURE / "model.onnx", load_external_data=False)
    parts = low_rank(model, rank, rank)
    nodes = []
    for node in model.graph.node:
        name = node.name.removesuffix("/MatMul")
        nodes.append(node)
        if name not in parts:
            continue
        _, a, b = parts[name]
        result, node.output[0] = node.output[0], f"{name}/plain"
        for suffix, value in (("a", a), ("b", b)):
            model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), f"{name}/lora_{suffix}"))
        nodes += [
            helper.make_node("MatMul", [node.input[0], f"{name}/lora_a"], [f"{name}/thin"], f"{name}/lora_a/MatMul"),
            helper.make_node("MatMul", [f"{name}/thin", f"{name}/lora_b"], [f"{name}/adapted"], f"{name}/lora_b/MatMul"),
            helper.make_node("Add", [f"{name}/plain", f"{name}/adapted"], [result], f"{name}/Add"),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    try:
        os.link(FIXTURE / "model.onnx.data", folder / "model.onnx.data")
    except OSError:
        shutil.copy(FIXTURE / "model.onnx.data", folder / "model.onnx.data")
    return sum(a.nbytes + b.nbytes for _, a, b in parts.values())


def adapter(rank, seed, folder):
    """The same adapter as PEFT saves it."""
    model = onnx.load(FIXTURE / "model.onnx", load_external_data=False)
    header, data = {}, []
    at = 0
    for name, (_, a, b) in low_rank(model, rank, seed).items():
        module = name.removeprefix("/").replace("/", ".")
        for side, value in (("A", a.T), ("B", b.T)):
            value = np.ascontiguousarray(value.astype(np.float32))
            header[f"base_model.model.{module}.lora_{side}.weight"] = {
                "dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}  # fmt: skip
            at += value.nbytes
            data.append(value.tobytes())
    folder.mkdir()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": MODULES, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command[:3]))} … ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def generated(program, package, ids, threads):
    """Tokens, milliseconds to the first, milliseconds a token, and the same of processor time, the first with the load."""
    def once(count):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = run(program, "generate", package, "--prompt-ids", ",".join(map(str, ids)), "--max-new-tokens", count, "--ignore-eos",
                     "--temperature", 0, "--device", "cpu", "--json", "--quiet", *threads)  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return json.loads(answer), 1e3 * (after.ru_utime - before.ru_utime)

    (answer, whole), (_, short) = once(NEW), once(1)
    return answer["tokens"], answer["timing"]["ttft_ms"], answer["timing"]["tpot_ms"], short, (whole - short) / (NEW - 1)


def together(server, models):
    """Seconds until as many clients as models have their tokens, and milliseconds of processor time a token."""
    def spent():
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return 1e3 * int(fields[11]) / os.sysconf("SC_CLK_TCK")

    def ask(i, model):
        ids = [100 + (i * 31 + j * 7) % 4000 for j in range(PROMPT)]
        body = {"model": model, "prompt": ids, "max_tokens": SERVED, "temperature": 0, "stream": True, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        _, response = server.post(body)
        found = 0
        for event in events(response):
            found += sum(len(choice.get("token_ids") or []) for choice in event.get("choices", []))
        if found != SERVED:
            failed.append(f"{model}: {found} tokens of {SERVED}")

    failed = []
    start, before = time.perf_counter(), spent()
    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        sys.exit("\n".join(failed))
    return time.perf_counter() - start, (spent() - before) / (SERVED * len(models))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lapidary")
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--threads", type=int, help="[default: all cores]")
    parser.add_argument("--output")
    given = parser.parse_args()
    ranks = list(map(int, given.ranks.split(",")))
    threads = ["--threads", given.threads] if given.threads else []
    ids = [100 + i * 7 % 4000 for i in range(PROMPT)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        convert = ["--dtype", "fp16", "--target", "cpu", "--capacity", "256", "--quiet", "--tokenizer", FIXTURE]
        run(given.lapidary, "convert", FIXTURE / "model.onnx", "-o", folder / "plain", *convert)
        packages, sizes = {}, {}
        for rank in ranks:
            sizes[rank] = with_branches(rank, folder / f"export-{rank}")
            packages["run time", rank] = folder / f"branches-{rank}"
            run(given.lapidary, "convert", folder / f"export-{rank}" / "model.onnx", "-o", packages["run time", rank], *convert)
            shutil.rmtree(folder / f"export-{rank}")
            merged = packages["merged", rank] = folder / f"merged-{rank}"
            shutil.copytree(folder / "plain", merged)
            run(given.lapidary, "refit", merged, "--from", FIXTURE / "model.onnx", "--lora", adapter(rank, rank, folder / f"adapter-{rank}"), "--quiet")
        samples = {key: [] for key in packages}
        agreed = {}
        for turn in range(given.rounds):
            tokens = {}
            for key, package in packages.items():
                tokens[key], *times = generated(given.lapidary, package, ids, threads)
                samples[key].append(times)
            for rank in ranks:
                pairs = zip(tokens["run time", rank], tokens["merged", rank])
                agreed[rank] = next((i for i, (one, other) in enumerate(pairs) if one != other), NEW)
                if agreed[rank] < 4:
                    sys.exit(f"rank {rank}: the tokens differ from the start, so these are not the same adapter")
            print(f"round {turn + 1} of {given.rounds}", file=sys.stderr)
        rank = ranks[len(ranks) // 2]
        flags, names = [], []
        for i in range(given.clients):
            directory = adapter(rank, 100 + i, folder / f"served-{i}")
            flags += ["--adapter", f"a{i}={directory}"]
            names.append(f"a{i}")
        batch = ["--max-sequences", str(given.clients), "--kept-prefixes", "0", *map(str, threads)]
        servers = {
            "merged": (Server(given.lapidary, folder / "plain", *flags, *batch), names),
            "run time": (Server(given.lapidary, packages["run time", rank], *batch), [packages["run time", rank].name] * given.clients),
            "no adapter": (Server(given.lapidary, folder / "plain", *batch), ["plain"] * given.clients),
        }
        served = {name: [] for name in servers}
        try:
            for turn in range(given.rounds + 1):
                for name, (server, models) in servers.items():
                    seconds, processor = together(server, models)
                    if turn:
                        served[name].append((given.clients * SERVED / seconds, processor))
            memory = {name: server.resident() for name, (server, _) in servers.items()}
        finally:
            for server, _ in servers.values():
                server.stop()
    result = {"model": "SmolLM2-135M-Instruct, fp16", "machine": platform.machine(), "cores": os.cpu_count(), "prompt": PROMPT, "tokens": NEW,
              "rounds": given.rounds, "ranks": {}}  # fmt: skip
    for each in ranks:
        entry = {"adapter_mb": sizes[each] / 1e6, "first_tokens_equal": agreed[each]}
        for kind in ("merged", "run time"):
            for i, name in enumerate(MEASURES):
                entry.setdefault(name, {})[kind] = statistics.median(sample[i] for sample in samples[kind, each])
        for name in MEASURES:
            entry[name]["ratio"] = entry[name]["run time"] / entry[name]["merged"]
        entry["samples"] = {kind: samples[kind, each] for kind in ("merged", "run time")}
        result["ranks"][each] = entry
    result["served"] = {"clients": given.clients, "rank": rank, "prompt": PROMPT, "tokens": SERVED,
                        "tokens_per_s": {name: statistics.median(one for one, _ in values) for name, values in served.items()},
                        "processor_ms": {name: statistics.median(one for _, one in values) for name, values in served.items()},
                        "samples": served, "resident_mb": memory}  # fmt: skip
    give(result, given.output)


if __name__ == "__main__":
    main()
