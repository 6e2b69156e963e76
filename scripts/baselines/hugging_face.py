"""A transformers model to measure, and torch's facts about the machine."""

import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

import schema
import weights_hash
from schema import Unusable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "gpu"))
import make_model  # noqa: E402 - lies in scripts/gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(source, dtype, device, attention):
    """`made:SIZE` (see scripts/gpu/make_model.py) or a Hugging Face folder; the model, its name and the load in ms."""
    kind, _, size = source.partition(":")
    start = time.perf_counter()
    if kind == "made":
        if size not in make_model.SIZES:
            raise Unusable(f"{source}: made models are {', '.join(make_model.SIZES)}")
        model = make_model.hugging_face(size, make_model.POSITIONS[size], DTYPES[dtype], device)
        model.set_attn_implementation(attention)
        name, load_ms = f"llama-{size}", None
    else:
        folder = Path(source)
        if not (folder / "config.json").is_file():
            raise Unusable(f"{source}: no Hugging Face folder (no config.json in it), and not made:SIZE")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation=attention, local_files_only=True).to(device).eval()  # fmt: skip
        synchronize(device)
        name, load_ms = folder.name, (time.perf_counter() - start) * 1e3
    # No early stop, and plain greedy decoding.
    config = model.generation_config
    config.eos_token_id, config.pad_token_id, config.do_sample = None, 0, False
    config.temperature = config.top_p = config.top_k = None
    return model, name, load_ms


def facts(model, source, name, dtype, expected_hash):
    """The schema's `model`; refuses weights with another hash than expected."""
    found = weights_hash.of_torch(model) if source.startswith("made:") else weights_hash.of_file(source)["hash"]
    if expected_hash and found != expected_hash:
        raise Unusable(f"the weights of {name} hash to {found}, not {expected_hash}: not the model it is compared with")
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    parameters = sum(p.numel() for p in model.parameters())
    return schema.Model(name, model.config.to_dict(), parameters, tied, dtype, found)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def versions():
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
             "cuda": torch.version.cuda if torch.cuda.is_available() else None}  # fmt: skip
    for name in ("triton", "flash_attn"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    return found


def machine(device, dtype, threads):
    found = schema.host()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        smi = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                             text=True)  # fmt: skip
        found["gpu"] = {"name": properties.name, "driver": smi.stdout.strip() or None,
                        "memory_bytes": properties.total_memory,
                        "compute_capability": f"{properties.major}.{properties.minor}"}  # fmt: skip
        found["copy_bandwidth_bytes_per_s"] = gpu_copy_bandwidth()
    else:
        found["copy_bandwidth_bytes_per_s"] = schema.cpu_copy_bandwidth(threads)
    found["peak_flops"] = matmul_peak(device, dtype)
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def gpu_copy_bandwidth():
    """Bytes read and written per second by a device-to-device copy of 2 GiB, the best of ten."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    best = min(events_ms(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.nbytes / (best / 1e3)


def matmul_peak(device, dtype):
    """FLOP/s of a large square product of random numbers, the mean of ten after three."""
    size = 8192 if device == "cuda" else 1024
    if device == "cpu":
        dtype = "fp32"  # CPUs multiply in fp32; their fp16 is emulated
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    call = lambda: a @ b
    for _ in range(3):
        call()
    if device == "cuda":
        ms = math.fsum(events_ms(call) for _ in range(10)) / 10
    else:
        start = time.perf_counter()
        for _ in range(10):
            call()
        ms = (time.perf_counter() - start) * 100
    return {"flops": 2 * size**3 / (ms / 1e3), "source": f"measured: {size}x{size}x{size} product of {dtype} in torch"}


def events_ms(call):
    """Milliseconds of the GPU between two events around a call."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def used_bytes():
    """Of the GPU, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def device_memory(model, cache_bytes, context):
    """Bytes of the GPU at their peak: weights, cache, `context` (in use before the model was there), what was held beside
    them, and all that was in use."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # The context, libraries, CUDA graphs: memory that torch does not count.
    outside = used_bytes() - torch.cuda.memory_reserved()
    peak = torch.cuda.max_memory_reserved() + max(0, outside)
    scratch = max(0, peak - weights - cache_bytes - context)
    return {"weights": weights, "cache": cache_bytes, "scratch": scratch, "context": context, "total": peak}
