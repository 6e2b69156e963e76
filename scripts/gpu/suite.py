"""Tests that run on the GPU: the CPU executor's own cases on TensorRT (the test binary `executor` with
LAPIDARY_TEST_BACKEND=tensorrt: one suite, two back ends), and those that need a GPU (the binary `gpu`).

Each of the executor's tests has a process of its own: within one process TensorRT loads one engine at a time.
"""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from common import BIN, ROOT, note

ENVIRONMENT = {"LAPIDARY_TEST_BACKEND": "tensorrt", "NVIDIA_TF32_OVERRIDE": "0", "RUST_BACKTRACE": "0", "PROPTEST_CASES": os.environ.get("PROPTEST_CASES", "12"),
               "PROPTEST_MAX_SHRINK_ITERS": "4"}
# ONNX's node tests ask the executor alone, and their files are not carried.
ELSEWHERE = "node_tests"


def main(timeout=170):
    with ThreadPoolExecutor(14) as pool:
        tests = list(pool.map(lambda name: one("executor", name, timeout), names("executor")))
    # What measures or fills the device's memory is alone there.
    tests += [one("gpu", name, timeout) for name in names("gpu", "--ignored")]
    failed = [test["test"] for test in tests if not test["ok"]]
    note(f"{len(tests) - len(failed)} of {len(tests)} tests passed on the GPU", *failed)
    return {"ok": not failed and len(tests) > 0, "passed": len(tests) - len(failed), "of": len(tests), "tests": tests}


def names(binary, *flags):
    listed = subprocess.run([str(BIN / binary), "--list", *flags], capture_output=True, text=True, check=True).stdout
    tests = [line.removesuffix(": test") for line in listed.splitlines() if line.endswith(": test")]
    return [name for name in tests if ELSEWHERE not in name]


def one(binary, name, timeout):
    start = time.time()
    try:
        done = subprocess.run([str(BIN / binary), "--exact", name, "--include-ignored"], capture_output=True, text=True, cwd=ROOT,
                              timeout=timeout, env=os.environ | ENVIRONMENT)
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        text = (expired.stdout or b"").decode() + (expired.stderr or b"").decode()
        code = "timeout"
    # A filter without matches also exits with 0.
    ok = code == 0 and "1 passed" in text
    return {"test": f"{binary} {name}", "ok": ok, "seconds": round(time.time() - start, 1),
            **({} if ok else {"exit": code, "output": text[-4000:]})}
