"""Creates a model of real size, exports, converts, compares with transformers, and measures. For other systems see
bench.py."""

import gc
import json
import resource
import shutil
import sys
import time

import make_model
import parity
from common import PLANS, WORK, export_of, lab, lapidary, note, run

CAPACITIES = {"1b": "256,1024,4096", "8b": "256,1024,4096,131072", "tiny": "256,1024,4096"}
LIVE = 300


def stage(size, results, thorough=False):
    """`thorough`: other lowerings, weight modes and fp32 as well."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.time()
    model = make_model.hugging_face(size, make_model.POSITIONS[size], torch.float16, device)
    folder = export_of(size).parent
    if not export_of(size).exists():
        make_model.export(model, folder, make_model.POSITIONS[size])
    results["make_and_export_s"] = time.time() - start
    weights = sum(p.numel() * 2 for n, p in model.named_parameters() if "embed" not in n)
    results["weights_read_per_token_gb"] = weights / 1e9
    package = WORK / f"{size}-bind"
    results.attempt("convert", convert, folder, package, CAPACITIES[size], [])
    record = results.attempt("bench", lab, "bench", package, "--live", LIVE, "--prefill", "128,512")
    note({key: record.get(key) for key in ("decode", "prefill", "memory", "all_engines", "load_s")})
    results.attempt("moves", lab, "moves", package)
    vocabulary = model.config.vocab_size
    record = results.attempt("parity_fp16", parity.run, model, package, vocabulary)
    note({key: record.get(key) for key in ("ok", "error")}, record.get("cases"), record.get("batch"))
    if thorough:
        results.attempt("variants", variants, folder, size)
    if thorough and size != "8b":
        package32 = WORK / f"{size}-fp32"
        results.attempt("convert_fp32", convert, folder, package32, CAPACITIES[size], ["--dtype", "fp32"])
        results.attempt("parity_fp32", parity.run, model.float(), package32, vocabulary)
        shutil.rmtree(package32, ignore_errors=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        for mode, refit in (("embed", "none"), ("strip", "identical"), ("strip", "general")):
            other = WORK / f"{size}-{mode}"
            flags = ["--weights", mode, "--refit", refit, "--prefill", "128"]
            results.attempt(f"convert_{mode}_{refit}", convert, folder, other, "1024", flags)
            results.attempt(f"bench_{mode}_{refit}", lab, "bench", other, "--live", LIVE)
            shutil.rmtree(other, ignore_errors=True)


def convert(folder, package, capacities, flags):
    start = time.time()
    lapidary("convert", folder / "model.onnx", "-o", package, "--force", "--target", "tensorrt-rtx", "--engine-cache", PLANS,
             "--capacity", capacities, *flags)
    manifest = json.loads((package / "manifest.json").read_text())
    engines = [{"profile": e["file"].split("/")[-1], "mb": e["bytes"] / 1e6, "build_s": e["build_ms"] / 1e3}
               for e in manifest["engines"]]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": time.time() - start, "engines": engines, "largest_child_rss_mb": peak}


VARIANTS = {
    "plain": {"linear": "flatten_activation", "fuse_linear": False},
    "fused": {"linear": "flatten_activation", "fuse_linear": True},
    "reduced": {"linear": "reduce_row", "fuse_linear": False},
    "fused, reduced": {"linear": "reduce_row", "fuse_linear": True},
    "fused, reduced, attention decomposed": {"linear": "reduce_row", "fuse_linear": True, "attention": "decomposed"},
    "fused, reduced, heads not folded": {"linear": "reduce_row", "fuse_linear": True, "fold_groups": False},
}


def variants(folder, size):
    """Decode and one prefill chunk with other choices of the lowering."""
    out = {}
    for name, choices in VARIANTS.items():
        if size == "8b" and name in ("plain", "reduced", "fused, reduced, heads not folded"):
            continue
        spec, package = WORK / "variant.yaml", WORK / f"{size}-variant"
        spec.write_text(json.dumps({"lowering": choices}))
        try:
            convert(folder, package, "1024", ["--spec", spec, "--prefill", "512"])
            record = lab("bench", package, "--live", LIVE, "--prefill", "512", "--tokens", 8)
            out[name] = {"decode_gpu_ms": record["decode"]["gpu_ms"],
                         "prefill_512_gpu_ms": record["prefill"][0]["last_chunk_gpu_ms"]}
        except Exception as error:  # noqa: BLE001
            out[name] = {"error": str(error)[-600:]}
        note(name, out[name])
        shutil.rmtree(package, ignore_errors=True)
    return out


def tune(size, results, capacities="1024,4096", prefill="512"):
    """`convert --tune`: what every profile's lowerings took, and the tuned package's times."""
    folder, package = export_of(size).parent, WORK / f"{size}-tuned"
    if not export_of(size).exists():
        run(sys.executable, make_model.__file__, size, folder)
    spec = WORK / "tuned.yaml"
    results.attempt("convert", convert, folder, package, capacities,
                    ["--prefill", prefill, "--tune", "--save-spec", spec])
    results["spec"] = spec.read_text()
    results["tuning"] = json.loads((package / "manifest.json").read_text())["tuning"]
    for profile in results.values["tuning"]["profiles"]:
        note(profile["profile"], f"{profile['untuned_ms']:.3f} -> {profile['ms']:.3f} ms")
        for attempt in profile["tried"]:
            note("   ", attempt["about"], attempt["what"], attempt["ms"], (attempt["error"] or "")[:200])
    live = min(LIVE, int(capacities.split(",")[-1]) // 4)
    results.attempt("bench", lab, "bench", package, "--live", live, "--tokens", 16, "--prefill", prefill)


if __name__ == "__main__":
    from common import Results

    stage(sys.argv[1], Results(f"gpu-{sys.argv[1]}.json"))
