"""Two weight sets and one set of engines: the time to switch between them, on disk and on the GPU.

Packages of one model are made for the first set: with bound weights, and stripped for a general and for an identical refit.
`lapidary strip` and `lapidary refit` make the same package with the second set, without building an engine. Then sessions swap
between the two while their engines stay loaded (`gpu_lab swap`), which also checks that the logits are those of a fresh session.
"""

import json
import shutil
import time

import make_model
from common import WORK, export_of, lab, lapidary, note, run
from models import convert

FLAGS = {
    "bind": ["--weights", "bind"],
    "general": ["--weights", "strip", "--refit", "general"],
    "identical": ["--weights", "strip", "--refit", "identical"],
}
CAPACITY, CHUNK = "1024", "128"


def stage(size, results, modes=("bind", "general", "identical")):
    folders = results.attempt("make_and_export", two_sets, size)
    if "error" in folders:
        return
    first, second = sets(size)
    for mode in modes:
        results.attempt(mode, of_mode, mode, size, first, second)
        shutil.rmtree(WORK / f"{size}-refit-{mode}-1", ignore_errors=True)
        shutil.rmtree(WORK / f"{size}-refit-{mode}-2", ignore_errors=True)


def sets(size):
    """Where the exports are. The first is the one that other stages use."""
    return export_of(size).parent, WORK / f"{size}-set2"


def two_sets(size):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, out = time.time(), {}
    for seed, folder in enumerate(sets(size), 1):
        if (folder / "model.onnx").exists():
            continue
        model = make_model.hugging_face(size, make_model.POSITIONS[size], torch.float16, device, seed=seed)
        make_model.export(model, folder, make_model.POSITIONS[size])
        out["gb"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
    return out | {"seconds": time.time() - start}


def timed(*arguments):
    start = time.time()
    lapidary(*arguments)
    return time.time() - start


def generate(package):
    """Waiting times of a user: the command, its loading time, and the first token."""
    start = time.time()
    record = json.loads(lapidary("generate", package, "--prompt-ids", "5,6,7,8", "--max-new-tokens", 4, "--temperature", 0,
                               "--ignore-eos", "--device", "cuda", "--json"))
    return {"seconds": time.time() - start, "tokens": record["tokens"]} | {
        key: record["timing"][key] for key in ("load_ms", "ttft_ms")}


def of_mode(mode, size, first, second):
    one, two = (WORK / f"{size}-refit-{mode}-{i}" for i in (1, 2))
    out = {"convert": convert(first, one, CAPACITY, [*FLAGS[mode], "--prefill", CHUNK])}
    # The first load compiles kernels; what is kept then serves both packages, since their plans are the same.
    out["generate_first_load"], out["generate"] = generate(one), generate(one)
    out["strip_s"] = timed("strip", one, "-o", two, "--force")
    stripped = run("du", "-sb", two).split()[0]
    out["stripped_bytes"] = int(stripped)
    if mode == "identical":
        return out | other_weights_are_refused(one, two, first, second)
    out["refit_s"] = timed("refit", two, "--from", second / "model.onnx")
    out["generate_second_set"] = generate(two)
    out["refit_then_generate_s"] = out["refit_s"] + out["generate_second_set"]["seconds"]
    out["sets_differ"] = out["generate"]["tokens"] != out["generate_second_set"]["tokens"]
    out["swap"] = lab("swap", one, "--weights", two, "--times", 5)
    summary = {way: [round(s["seconds"], 3) for s in out["swap"][way]] for way in ("there", "back")}
    note(mode, "ok" if out["swap"]["ok"] else "WRONG", "equal" if out["swap"]["equal"] else "not to the last bit", summary)
    return out


def other_weights_are_refused(one, two, first, second):
    """An identical refit accepts only its own weights, on disk and in a session."""
    refused = lapidary("refit", two, "--from", second / "model.onnx", "--mode", "identical", check=False)
    out = {"other_set_refused": refused.returncode == 2, "message": refused.stderr.strip()[-400:]}
    out["refit_s"] = timed("refit", two, "--from", first / "model.onnx", "--mode", "identical")
    out["generate_again"] = generate(two)
    # Its own weights once more, under loaded engines.
    out["swap"] = lab("swap", one, "--weights", two, "--times", 3)
    return out
