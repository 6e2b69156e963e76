"""The benchmark on a GPU: every system over one model, each in a process of its own, one result file a system.

A stage makes (or finds) the model, its workload and the fp32 reference, converts with `lapidary convert`, runs `lapidary
bench` and every baseline. A job with an existing file is not run again, so an interrupted stage continues where it
stopped; no job starts after the time of a call is over, BENCH_SECONDS for all its stages. After each job all files go
into one archive under $OUT, unfinished ones (`*.partial.json`) too.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make_model
from common import BIN, PLANS, ROOT, WORK, export_of, lapidary, note

BASELINES = ROOT / "scripts" / "baselines"
# Decode runs are of 16 tokens: from 4080 they fill a cache of 4096.
CASES = ["--prefill", "128,512", "--live", "300,4080", "--end-to-end", "128:512"]
CAPACITIES = [256, 1024, 4096]
# The most important first, in case time runs out.
MODES = ["static-compile", "frozen", "frozen-flash", "eager", "eager-flash", "static"]
# In the brief run whole texts are generated once or twice.
BRIEF_CASES = {"eager": ["--prefill", "128,512", "--live", "300,4080", "--end-to-end", "128:512", "--runs", "1"],
               "compiled": ["--prefill", "128,512", "--live", "300,4080", "--end-to-end", "128:512", "--runs", "2"]}
START, SECONDS = time.time(), float(os.environ.get("BENCH_SECONDS", "520"))
TARGET = os.environ.get("BENCH_TARGET", "tensorrt-rtx")
DEVICE = "cpu" if TARGET == "cpu" else "cuda"


class Stage:
    """The jobs of one model: their files, their state, and the remaining time."""

    def __init__(self, model, results, timed=4096):
        """`timed`: tokens of the workload that prompts and contexts are cut from."""
        self.model, self.results, self.timed = model, results, timed
        self.lock = threading.Lock()
        self.folder = WORK / "bench" / model
        self.files = self.folder / "results"
        self.files.mkdir(parents=True, exist_ok=True)
        self.workload, self.reference = self.folder / "workload.json", self.files / f"{model}-reference.json"
        self.package = self.folder / model  # reports call a conversion what its folder is called

    def left(self):
        return SECONDS - (time.time() - START)

    def job(self, name, function, file=None):
        """Runs `function` unless `file` is there; keeps why it failed. Gives whether its result is there."""
        if file and file.exists():
            return True
        if self.left() < 15:
            note(f"{name}: left for another call, the time of this one is up")
            self.results[name] = {"skipped": "time"}
            return False
        note(name, "…")
        start, entry = time.time(), {}
        try:
            entry = function() or {}
        except Exception as error:  # noqa: BLE001 - one failure must not end a run on a borrowed machine
            entry = {"error": f"{type(error).__name__}: {error}"[:3000]}
            note(name, "FAILED:", entry["error"])
        entry["seconds"] = round(time.time() - start, 1)
        note(f"{name} took {entry['seconds']} s, {self.left():.0f} s left")
        with self.lock:  # packages are made by several threads
            self.results[name] = entry
            self.pack()
        return "error" not in entry

    def process(self, command):
        """A job's process, what it says passed on."""
        command = list(map(str, command))
        done = subprocess.run(command, stdout=sys.stderr, timeout=max(15, self.left()))
        if done.returncode != 0:
            names = [Path(part).name for part in command[:3]]
            raise RuntimeError(f"{' '.join(names)} … ended with {done.returncode}")

    def pack(self):
        out = Path(os.environ.get("OUT", ".")) / f"bench-{self.model}.tar.gz"
        with tarfile.open(out, "w:gz") as archive:
            for file in sorted(self.files.glob("*.json")):
                archive.add(file, file.name)

    def baseline(self, script, *arguments):
        self.process([sys.executable, BASELINES / script, *arguments])

    # -- what every system is given

    def prepare(self, source):
        """Workload and reference; the hash all weights must have."""
        if source.startswith("made:"):
            vocabulary = make_model.SIZES[source.removeprefix("made:")]["vocab_size"]
            arguments = ["--vocabulary", vocabulary, "--timed", self.timed]
        else:
            arguments = ["--ids-from", ROOT / "fixtures/smollm2/reference.json"]
        if not self.workload.exists():  # also where results of an earlier machine were carried back
            self.baseline("workload.py", self.workload, *arguments)
            if self.reference.exists():
                forced = json.loads(self.reference.read_text())["outputs"]["greedy_tokens"]
                self.workload.write_text(json.dumps(json.loads(self.workload.read_text()) | {"forced": forced}))
        if not self.job("reference", lambda: self.transformers("reference", source, self.reference), self.reference):
            raise RuntimeError("without a reference nothing can be compared")

    def transformers(self, mode, source, file, *more, cases=CASES):
        reference = [] if mode == "reference" else ["--reference", self.reference, "--weights-hash", self.hash()]
        self.baseline("transformers_baseline.py", mode, "--model", source, "--model-name", self.model, "--workload", self.workload,
                      "-o", file, "--dtype", "fp16", *([] if mode == "reference" else cases), *reference, *more)  # fmt: skip

    def hash(self):
        return json.loads(self.reference.read_text())["model"]["weights_hash"]

    def all_transformers(self, source):
        for mode in MODES:
            self.one_transformers(source, mode, CASES)

    def one_transformers(self, source, mode, cases):
        self.prepare(source)
        file = self.files / f"{self.model}-transformers-{mode}.json"
        self.job(f"{self.model} transformers {mode}", functools.partial(self.transformers, mode, source, file, cases=cases), file)

    # -- ours

    def convert(self, export, package, capacities, *flags):
        """A package; engines that another package has are taken from its cache."""
        if (package / "manifest.json").exists():
            return {"already": True}
        lapidary("convert", export, "-o", package, "--force", "--target", TARGET, "--engine-cache", PLANS,
                 "--capacity", ",".join(map(str, capacities)), *flags, timeout=max(15, self.left()))  # fmt: skip
        engines = json.loads((package / "manifest.json").read_text())["engines"]
        return {"engines": len(engines), "longest_build_s": max((e["build_ms"] for e in engines), default=0) / 1e3,
                "plans_mb": sum(e["bytes"] for e in engines) / 1e6}  # fmt: skip

    def bench(self, package, file, label, *flags, cases=CASES, settings=()):
        settings = [part for key, value in settings for part in ("--setting", f"{key}={value}")]
        # Shares of the same bandwidth and the same peak as transformers' are of.
        machine = json.loads(self.reference.read_text())["machine"]
        peak = machine["peak_flops"]
        shares = ["--copy-bandwidth", machine["copy_bandwidth_bytes_per_s"], "--peak-flops", peak["flops"],
                  "--peak-flops-source", peak["source"]]  # fmt: skip
        self.process([BIN / "lapidary", "bench", package, "-o", file, "--device", DEVICE, "--prompts", self.workload,
                      "--model-name", self.model, "--label", label, *cases, "--runs", 4, *shares, *settings, *flags])  # fmt: skip
        self.baseline("compare.py", self.reference, file)


def made(size, results):
    """One of make_model's sizes: the main comparison."""
    stage = Stage(f"llama-{size}", results)
    source, package = f"made:{size}", stage.package

    def packaged():
        return exported(stage, size) and stage.job(
            "convert", lambda: stage.convert(exported(stage, size), package, CAPACITIES))

    # Neither is timed, and one wants the GPU, the other the CPU.
    with ThreadPoolExecutor(2) as pool:
        reference, ours = pool.submit(stage.prepare, source), pool.submit(packaged)
    reference.result()
    if ours.result():
        lapidary_of(stage)
    stage.all_transformers(source)
    onnx_parser(stage, size)
    return stage


def exported(stage, size, form=""):
    """The export, made if missing; None if that failed."""
    path = export_of(size, form)
    make = [sys.executable, Path(make_model.__file__), size, path.parent, *(["--form", form] if form else [])]
    there = path.exists() or stage.job(f"export {size} {form}".strip(), lambda: stage.process(make))
    return path if there else None


def lapidary_of(stage):
    package, file = stage.package, stage.files / f"{stage.model}-lapidary.json"
    # Kept in the archive: the conversion record for the report, because the package is not archived.
    record = stage.files / f"{stage.model}-conversion.json"
    stage.job(f"{stage.model} conversion", lambda: record.write_text(lapidary("info", package, "--conversion")) and None, record)
    stage.job(f"{stage.model} lapidary", lambda: stage.bench(package, file, "Lapidary", "--profile", "--first-load"), file)


def onnx_parser(stage, size):
    """TensorRT's own parser, on the export ours came from and on one of plain operators."""
    genai, plain = (functools.partial(exported, stage, size, form) for form in ("", "plain"))
    parser(stage, "genai", genai)
    # It embeds weights: two copies of 16 GB in the host's memory while it builds would take the machine's time and room.
    if TARGET != "cpu" and size != "8b":
        parser(stage, "plain", plain)
        parser(stage, "plain", plain, "--specialization", "none")


def parser(stage, name, export, *flags):
    """`export` makes it, if nothing was measured yet."""
    file = stage.files / f"{stage.model}-onnx-parser-{'-'.join([name, *flags[1:]])}.json"

    def measure(path):
        if TARGET == "cpu":
            raise RuntimeError("needs a GPU")
        stage.baseline("tensorrt_onnx_baseline.py", path, "--workload", stage.workload, "-o", file, "--model-name", stage.model,
                       "--export", name, "--reference", stage.reference, "--weights-hash", stage.hash(), *CASES, *flags)  # fmt: skip

    if not file.exists() and (path := export()):
        stage.job(f"onnx parser, {name} {' '.join(flags)}", functools.partial(measure, path), file)


def smollm2(results):
    """Real weights, rebuilt on this machine from the GGUF that was carried (scripts/gpu/pack.sh)."""
    stage = smollm2_prepared(results)
    lapidary_of(stage)
    stage.all_transformers(str(stage.folder / "checkpoint"))
    parser(stage, "optimum-fp32", lambda: ROOT / "fixtures" / "smollm2" / "model.onnx")
    return stage


def smollm2_prepared(results):
    """Its weights, package, checkpoint and reference."""
    stage = Stage("smollm2", results)
    fixture = ROOT / "fixtures" / "smollm2"
    gguf = os.environ.get("SMOLLM2_GGUF", "/tmp/smollm2/model.gguf")
    weights = [sys.executable, ROOT / "scripts/smollm2_weights.py", "--source", gguf]
    export, package, checkpoint = fixture / "model.onnx", stage.package, stage.folder / "checkpoint"
    if not (package / "manifest.json").exists() and not stage.job("weights", lambda: stage.process(weights)):
        return stage
    if not stage.job("convert", lambda: stage.convert(export, package, CAPACITIES, "--dtype", "fp16")):
        return stage
    if not (checkpoint / "config.json").exists():
        # The same numbers as a Hugging Face folder; `weights_hash` of what transformers loads proves it.
        lapidary("weights", package, "--export", checkpoint)
        shutil.copy(fixture / "config.json", checkpoint)
    stage.prepare(str(checkpoint))
    return stage


# -- one switch at a time

# By default one capacity, so that a variant has three engines, most of them in the plan cache.
SMALL = ["--prefill", "128,512"]
SMALL_CASES = ["--prefill", "128,512,960", "--live", "300", "--end-to-end", "128:512"]


class Variant:
    """A package, its benchmark flags, and its changed switch. `lapidary report` compares it with the run without a
    switch that is most like it; it knows the groups by these names."""

    def __init__(self, group, switch, convert=(), capacities=(1024,), lowering=None, bench=(), cases=None, package=None):
        self.group, self.switch, self.capacities = group, switch, list(capacities)
        self.convert, self.lowering, self.bench = list(convert) or SMALL, lowering, list(bench)
        self.cases = cases or SMALL_CASES
        # Variants of one name share the package.
        self.package = package or self.name()

    def name(self):
        return "-".join(re.findall(r"[a-z0-9]+", f"{self.group or ''} {self.switch}".lower()))

    def label(self):
        return f"{self.group}: {self.switch}" if self.group else f"Lapidary, {self.switch}"

    def settings(self):
        return [("ablation.group", self.group), ("ablation.switch", self.switch)] if self.group else []


VARIANTS = [
    Variant(None, "capacity 1024", package="base"),
    Variant("cuda_graphs", "off", package="base", bench=["--no-cuda-graphs"]),
    Variant("dry", "on", package="base", bench=["--dry-multiplier", "0.8"]),
    Variant("attention", "one layer, query groups folded", lowering={"attention": "layer", "fold_groups": True}),
    Variant("attention", "one layer, heads as they are", lowering={"attention": "layer", "fold_groups": False}),
    Variant("products", "one for each weight", lowering={"fuse_linear": False}),
    Variant("products", "matrix product for one row", lowering={"linear": "flatten_activation"}),
    Variant("shapes", "dynamic, 1 to 512 tokens", convert=["--prefill", "1:128:512"]),
    Variant("chunk", "128", convert=["--prefill", "128"]),
    Variant("chunk", "512", convert=["--prefill", "512"]),
    Variant("chunk", "1024", convert=["--prefill", "1024"]),
    Variant("weights", "embed", convert=["--weights", "embed", *SMALL]),
    Variant("weights", "strip, identical refit", convert=["--weights", "strip", "--refit", "identical", *SMALL]),
    Variant("weights", "strip, general refit", convert=["--weights", "strip", "--refit", "general", *SMALL]),
    # Has something in common with both runs without a switch: the main one, whose cache grows, and the one above.
    Variant("cache", "one capacity, 4096", capacities=(4096,),
            cases=["--prefill", "128,512,960", "--live", "300,4080", "--end-to-end", "128:512"]),
]


def ablations(size, results, variants=VARIANTS):
    """Packages are made before anything is timed, then benched one after the other."""
    stage = Stage(f"llama-{size}", results)
    there = ablation_packages(stage, size, variants)
    stage.prepare(f"made:{size}")
    files = {v: result_of(stage, v) for v in variants}
    for variant in variants:
        if not there.get(variant.package):
            continue
        bench = functools.partial(stage.bench, package_of(stage, variant.package), files[variant], variant.label(), *variant.bench,
                                  cases=variant.cases, settings=variant.settings())  # fmt: skip
        stage.job(variant.label(), bench, files[variant])
    for name in there:
        if all(files[v].exists() for v in variants if v.package == name):
            shutil.rmtree(package_of(stage, name), ignore_errors=True)
    return stage


def ablation_packages(stage, size, variants):
    """Packages of those variants that have no result yet, side by side: name to whether it is there."""
    wanted = {v.package: v for v in variants if not result_of(stage, v).exists()}
    export = wanted and exported(stage, size)
    if not export:
        return {}
    base = next(v for v in VARIANTS if v.package == "base")

    def convert(variant):
        spec = stage.folder / f"{variant.package}.yaml"
        # A lowering that is named replaces the usual one as a whole, so the change is laid over what the base got.
        changed = json.loads(usual.read_text()) | variant.lowering if variant.lowering and usual.exists() else None
        spec.write_text(json.dumps({"lowering": changed} if changed else {}))
        package = package_of(stage, variant.package)
        record = stage.convert(export, package, variant.capacities, "--spec", spec, *variant.convert)
        engines = json.loads((package / "manifest.json").read_text())["engines"]
        if variant.package == "base" and engines:
            usual.write_text(json.dumps(next(e for e in engines if "-t1-" in e["file"])["lowering"]))
        return record

    usual = stage.folder / "lowering.json"
    made_of = lambda v: stage.job(f"convert {v.package}", functools.partial(convert, v))
    # The base first: the others take from the plan cache what they have in common with it, and lowerings are compared with its.
    there = {"base": made_of(base)} if "base" in wanted or not usual.exists() else {}
    others = {name: v for name, v in wanted.items() if name not in there}
    with ThreadPoolExecutor(1 if TARGET == "cpu" else 4) as pool:
        return there | dict(zip(others, pool.map(made_of, others.values())))


def result_of(stage, variant):
    return stage.files / f"{stage.model}-{'ablation' if variant.group else 'lapidary'}-{variant.name()}.json"


def package_of(stage, name):
    return stage.folder / "variants" / name


# -- one call of ten minutes

BRIEF_VARIANTS = ["capacity 1024", "off", "on", "one layer, query groups folded", "matrix product for one row",
                  "dynamic, 1 to 512 tokens", "one capacity, 4096"]


def prepare(results):
    """What needs torch alone, so that it can run while the rest is still on its way here: exports and references."""
    stages = {size: Stage(f"llama-{size}", results) for size in ("1b", "8b")}
    for size, stage in stages.items():
        exported(stage, size)
    # One after the other: they measure the GPU's bandwidth and peak too.
    for size, stage in stages.items():
        stage.prepare(f"made:{size}")


def packages(results):
    """What needs neither timing nor the GPU to itself: made models' packages that have no result yet, side by side."""
    def of_made(size):
        stage = Stage(f"llama-{size}", results)
        if not (stage.files / f"{stage.model}-lapidary.json").exists() and (export := exported(stage, size)):
            stage.job(f"convert {size}", lambda: stage.convert(export, stage.package, CAPACITIES))
        if size == "1b":
            ablation_packages(stage, size, VARIANTS)

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(of_made, size) for size in ("1b", "8b")]:
            job.result()


def brief(results):
    """The comparisons, what matters most first, of three models, over several calls; `prepare` and `packages` came before."""
    stages = {size: Stage(f"llama-{size}", results) for size in ("1b", "8b")}
    cases_of = lambda mode: BRIEF_CASES["eager" if mode == "eager" else "compiled"]
    transformers = lambda size, mode: stages[size].one_transformers(f"made:{size}", mode, cases_of(mode))

    def small(*modes):
        stage = Stage("smollm2", results)
        wanted = ["lapidary", *(f"transformers-{mode}" for mode in modes)]
        if all((stage.files / f"smollm2-{name}.json").exists() for name in wanted):
            return
        stage = smollm2_prepared(results)
        lapidary_of(stage)
        for mode in modes:
            stage.one_transformers(str(stage.folder / "checkpoint"), mode, cases_of(mode))

    def ours(size):
        # Also where the reference is of an earlier machine: the workload is made of it.
        stages[size].prepare(f"made:{size}")
        lapidary_of(stages[size])

    steps = [
        *(functools.partial(ours, size) for size in stages),
        lambda: transformers("8b", "static-compile"),
        lambda: transformers("1b", "static-compile"),
        lambda: transformers("8b", "frozen"),
        lambda: transformers("8b", "eager"),
        lambda: ablations("1b", results, [v for v in VARIANTS if v.switch in BRIEF_VARIANTS]),
        lambda: small("static-compile", "eager"),
        lambda: ablations("1b", results),
        lambda: transformers("1b", "eager"),
        lambda: onnx_parser(stages["1b"], "1b"),
        lambda: transformers("1b", "frozen"),
        lambda: transformers("1b", "static"),
        lambda: transformers("8b", "static"),
    ]
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - what depends on something that failed must not end the rest
            note("FAILED:", f"{type(error).__name__}: {error}")


def parsers(size, results):
    """Only TensorRT's own parser."""
    stage = Stage(f"llama-{size}", results)
    stage.prepare(f"made:{size}")
    onnx_parser(stage, size)


STAGES = {
    "prepare": prepare,
    "packages": packages,
    "brief": brief,
    "parser-1b": lambda results: parsers("1b", results),
    "bench-1b": lambda results: made("1b", results),
    "bench-8b": lambda results: made("8b", results),
    "bench-smollm2": smollm2,
    "ablations-1b": lambda results: ablations("1b", results),
    # For trying the scripts without a GPU: BENCH_TARGET=cpu.
    "bench-tiny": lambda results: made("tiny", results),
    "ablations-tiny": lambda results: ablations("tiny", results),
}
