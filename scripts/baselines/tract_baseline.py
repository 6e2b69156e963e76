#!/usr/bin/env python3
"""tract on the CPU as a baseline: drives examples/tract_baseline.rs, which times itself, and writes its result file.

    tract_baseline.py MODEL.onnx --binary target/release/examples/tract_baseline --workload WORKLOAD.json -o RESULT.json

The child reads `{"feed": [ids], "row": bool}` or `{"reset": true}` a line and answers `{"ms", "token", "row"}` a line.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

import stepwise
from schema import Unusable


class Decoder:
    dtype = "fp32"

    def __init__(self, binary, model, threads):
        command = [binary, model, "--threads", str(threads)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = self.child.pid
        answer = self.answer()
        self.version, self.load_ms = answer["version"], answer["load_ms"]

    def answer(self):
        line = self.child.stdout.readline()
        if not line:
            raise Unusable(f"tract_baseline ended with {self.child.wait()}")
        return json.loads(line)

    def ask(self, **question):
        self.child.stdin.write(json.dumps(question) + "\n")
        self.child.stdin.flush()
        return self.answer()

    def reset(self):
        self.ask(reset=True)

    def feed(self, ids):
        return np.array(self.ask(feed=ids, row=True)["row"], np.float32)

    def step(self, ids):
        answer = self.ask(feed=ids, row=False)
        return answer["ms"], answer["token"]


def main():
    parser = stepwise.parser(__doc__)
    parser.add_argument("--binary", type=Path, required=True, help="the built example tract_baseline")
    given = parser.parse_args()
    versions = {"python": platform.python_version()}

    def opened(model, threads):
        decoder = Decoder(given.binary, model, threads)
        versions["tract"] = decoder.version
        return decoder

    return stepwise.ended(stepwise.measure, given, opened, "tract", "tract", versions)


if __name__ == "__main__":
    sys.exit(main())
