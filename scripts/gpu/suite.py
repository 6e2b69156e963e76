"""Tests that run on the GPU: the CPU executor's own cases on TensorRT (the test binary `executor` with
LAPIDARY_TEST_BACKEND=tensorrt: one suite, two back ends), and those that only a GPU can show (the binary `gpu`)."""

import os
import re
import subprocess
import time

from common import BIN, ROOT

ENVIRONMENT = {"LAPIDARY_TEST_BACKEND": "tensorrt", "RUST_BACKTRACE": "0", "PROPTEST_CASES": os.environ.get("PROPTEST_CASES", "12"),
               "PROPTEST_MAX_SHRINK_ITERS": "4"}


def main(timeout=170):
    # ONNX's node tests ask the executor alone, and their files are not carried.
    parts = {"executor": binary("executor", timeout, "--test-threads", "14", "--skip", "node_tests"),
             "gpu": binary("gpu", timeout, "--ignored", "--test-threads", "1")}
    return {"ok": all(part["ok"] for part in parts.values())} | parts


def binary(name, timeout, *arguments):
    start = time.time()
    try:
        done = subprocess.run([str(BIN / name), *arguments], capture_output=True, text=True, cwd=ROOT, timeout=timeout,
                              env=os.environ | ENVIRONMENT)
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        text = (expired.stdout or b"").decode() + (expired.stderr or b"").decode()
        code = "timeout"
    passed = re.findall(r"^test (\S+) \.\.\. ok", text, re.M)
    failed = re.findall(r"^test (\S+) \.\.\. FAILED", text, re.M)
    ok = code == 0 and len(passed) > 0
    return {"ok": ok, "exit": code, "seconds": time.time() - start, "passed": passed, "failed": failed,
            "output": "" if ok else text[-12000:]}
