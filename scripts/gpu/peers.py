"""ONNX Runtime GenAI, transformers and Lapidary on one GPU in one run: the same weights in fp16, and the int4 codes of
GenAI's model builder.

`prepare` needs torch and the builder alone, so it can run while the rest is carried: it writes the checkpoint of a made model, GenAI's two
folders and the fp32 reference. `compare` converts and measures. Lapidary's fp16 package is of make_model.py's export, whose weights hash to
those of the checkpoint; its int4 package is of GenAI's own int4 export. If the builder cannot be imported because
onnxruntime-gpu is missing, only its Python part is run.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import make_model
from bench import Stage, exported
from common import ROOT, WORK, lapidary, note

sys.path.insert(0, str(ROOT / "scripts" / "baselines"))
import outputs  # noqa: E402

CASES = ["--prefill", "37,128,300,512,1000,4040", "--live", "64,300,1000,4080,8064", "--end-to-end", "300:128"]
# Each length of a cache is another compilation of transformers' step.
COMPILED_CASES = ["--prefill", "128,512", "--live", "300,4080", "--end-to-end", "300:128", "--runs", "1"]
TRANSFORMERS = ["frozen-flash", "static-compile", "eager"]
OURS = ["--decode-samples", "64", "--repetitions", "8"]
# Slots of GenAI's shared cache. Its step takes as long with 4224 (llama-8b, 300 tokens: 5.27 ms).
SLOTS = 8192
# Large files that are read once; WORK may be memory.
DISK = Path(os.environ.get("PEERS", "/tmp/lapidary-peers"))
CAPACITIES = [1024, 4096, 8192]
BATCH = ["--batch", "2,4,8,16"]
# Imports the builder without the package's native library.
BUILDER = (
    "import importlib.util, runpy, sys, types; spec = importlib.util.find_spec('onnxruntime_genai'); "
    "package = types.ModuleType('onnxruntime_genai'); package.__path__ = list(spec.submodule_search_locations); "
    "sys.modules['onnxruntime_genai'] = package; runpy.run_module('onnxruntime_genai.models.builder', run_name='__main__')"
)


# Libraries of CUDA and cuDNN that torch brings.
LIBRARIES = sorted({str(path.parent) for path in Path(torch.__file__).parent.parent.glob("nvidia/*/lib/*.so*")})
os.environ["LD_LIBRARY_PATH"] = ":".join([*LIBRARIES, os.environ.get("LD_LIBRARY_PATH", "")])


def provider():
    return "cuda" if torch.cuda.is_available() else "cpu"


def half():
    return "fp16" if torch.cuda.is_available() else "fp32"


def checkpoint(size):
    folder = DISK / size / "checkpoint"
    if not (folder / "complete").exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = make_model.hugging_face(size, 2 * 4096, torch.float16, device)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "fixtures" / "smollm2" / name, folder)
        del model
        torch.cuda.empty_cache()
        (folder / "complete").touch()
    return folder


def built(stage, size, precision):
    """GenAI's folder, made if it is not there."""
    folder = DISK / size / precision
    if not (folder / "complete").exists():
        command = [sys.executable, "-c", BUILDER, "-i", checkpoint(size), "-o", folder, "-p", precision, "-e", provider(), "-c", DISK / "cache"]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"GenAI's builder ended with {done.returncode}: {done.stdout[-1500:]}")
        (folder / "complete").touch()
    return folder


def prepare(size, results):
    stage = Stage(f"llama-{size}", results, timed=SLOTS)
    exported(stage, size)
    stage.prepare(f"made:{size}")
    stage.job(f"checkpoint {size}", lambda: checkpoint(size) and None)
    for precision in (half(), "int4"):
        stage.job(f"GenAI builder {size} {precision}", lambda: built(stage, size, precision) and None)


def package(stage, size, precision, source):
    folder = stage.folder / f"peer-{precision}"
    if stage.job(f"convert {size} {precision}", lambda: stage.convert(source, folder, CAPACITIES, *BATCH)):
        return folder
    return None


def compare(size, results):
    """One after the other; for int4 also the difference between systems."""
    stage = Stage(f"llama-{size}", results, timed=SLOTS)
    stage.prepare(f"made:{size}")
    file = lambda name: stage.files / f"{stage.model}-peer-{name}.json"
    theirs = functools.partial(genai, stage, size)

    ours, ours4 = file("lapidary"), file("lapidary-int4")
    if fp16 := package(stage, size, half(), exported(stage, size)):
        measure = lambda: stage.bench(fp16, ours, f"Lapidary {half()}", *OURS, cases=CASES)
        stage.job(f"{size} Lapidary {half()}", measure, ours)
    theirs(half(), file("onnxruntime-genai"))
    codes = built(stage, size, "int4") / "model.onnx"
    if int4 := package(stage, size, "int4", codes):
        command = ["--device", "cuda" if torch.cuda.is_available() else "cpu", "--prompts", stage.workload, "--model-name", stage.model]
        measure = lambda: lapidary("bench", int4, "-o", ours4, *command, "--label", "Lapidary int4 (GenAI's codes)", *OURS, *CASES,
                                   timeout=max(15, stage.left())) and None  # fmt: skip
        stage.job(f"{size} Lapidary int4", measure, ours4)
    theirs("int4", file("onnxruntime-genai-int4"))
    for mode in TRANSFORMERS:
        result = file(f"transformers-{mode}")
        measure = functools.partial(stage.transformers, mode, f"made:{size}", result, cases=COMPILED_CASES)
        stage.job(f"{size} transformers {mode}", measure, result)
    stage.job(f"{size} int4 agreement", lambda: agreement(ours4, file("onnxruntime-genai-int4")))


def genai(stage, size, precision, file):
    folder = built(stage, size, precision)
    graph = ["--graph"] if torch.cuda.is_available() else []
    measure = lambda: stage.baseline(
        "ort_genai_baseline.py", folder / "model.onnx", "--checkpoint", checkpoint(size), "--workload", stage.workload, "-o", file,
        "--model-name", stage.model, "--reference", stage.reference, "--weights-hash", stage.hash(), "--capacity", SLOTS, *graph,
        "--runs", 2, *CASES)  # fmt: skip
    stage.job(f"{size} GenAI {precision}", measure, file)


def agreement(ours, theirs):
    ours, theirs = (json.loads(path.read_text()) for path in (ours, theirs))
    found = outputs.compare(ours["outputs"], "fp16", theirs)
    note("int4, ours against theirs:", outputs.summary_line(found))
    return found


def serve(size, results):
    """Throughput of the server's scheduler against concurrency, over the package of `compare`."""
    stage = Stage(f"llama-{size}", results, timed=SLOTS)
    for precision, source in ((half(), lambda: exported(stage, size)), ("int4", lambda: built(stage, size, "int4") / "model.onnx")):
        if precision == "int4" and not (DISK / size / "int4" / "complete").exists():
            continue
        folder = package(stage, size, precision, source())
        file = Path(os.environ.get("OUT", ".")) / f"serve-{size}-{precision}.json"
        measure = lambda: note(lapidary("bench", folder, "--serve", "1,2,4,8,16", "--serve-shape", "128:128", "-o", file,
                                        timeout=max(15, stage.left())))  # fmt: skip
        if folder:
            stage.job(f"serve {size} {precision}", measure, file)


def of(function):
    """Both sizes, the small one first."""
    return lambda results: [function(size, results) for size in os.environ.get("PEER_SIZES", "1b,8b").split(",")]


STAGES = {"peers-prepare": of(prepare), "peers": of(compare), "peers-serve": of(serve)}
