"""The CPU executor's own test cases, run on TensorRT: the test binary `executor` with LAPIDARY_TEST_BACKEND=tensorrt."""

import os
import re
import subprocess

from common import BIN, ROOT


def main(timeout=150):
    environment = os.environ | {"LAPIDARY_TEST_BACKEND": "tensorrt", "RUST_BACKTRACE": "0",
                                "PROPTEST_CASES": "12", "PROPTEST_MAX_SHRINK_ITERS": "4"}
    command = [str(BIN / "executor"), "--test-threads", "12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=timeout)
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        text = (expired.stdout or b"").decode() + (expired.stderr or b"").decode()
        code = "timeout"
    passed = re.findall(r"^test (\S+) \.\.\. ok", text, re.M)
    failed = re.findall(r"^test (\S+) \.\.\. FAILED", text, re.M)
    return {"ok": code == 0, "exit": code, "passed": passed, "failed": failed, "output": text[-12000:]}
