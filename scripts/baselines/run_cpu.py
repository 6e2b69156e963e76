#!/usr/bin/env python3
"""SmolLM2 on the CPU, every system side by side: Lapidary (f16 and f32 weights), ONNX Runtime, tract, transformers.

    scripts/baselines/run_cpu.py --threads 2 --rounds 3 -o benches/results/cpu

Each system runs in its own process, all with the same threads, prompts and weights, in rounds (A B C A B C …), so that
a slow minute of the machine affects all systems; the files hold the samples of all rounds. Outputs are compared before
anything else: with transformers in fp32 where a Python with torch is named by --torch-python, with ONNX Runtime
otherwise.

Needs the release binaries (`cargo build --release`, and for tract `--features tract --example tract_baseline`), the weights
(scripts/smollm2_weights.py), and onnxruntime in the Python that runs this. Exit status 1 when a system's outputs are not
equal, 2 when something is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import outputs
import schema
from compare import fill
from schema import Unusable, note

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# 37 tokens are the chat question of fixtures/smollm2/reference.json.
LENGTHS = [1, 17, 37, 128]


class Run:
    def __init__(self, given, scratch):
        self.given, self.scratch = given, scratch
        self.model = given.model / "model.onnx"
        self.name = given.model.name
        self.lapidary = given.binaries / "lapidary"
        wanted = {self.model: "name a folder with --model", self.lapidary: "build it, or name its folder with --binaries"}
        if (given.model / "weights.json").exists():
            wanted[given.model / "model.onnx.data"] = "run scripts/smollm2_weights.py"
        for file, how in wanted.items():
            if not file.exists():
                raise Unusable(f"{file}: no such file; {how}")
        self.workload = scratch / "workload.json"
        ids = json.loads((given.model / "reference.json").read_text())["prompt"]
        longest = max([*given.prefill, *(n + 16 for n in given.live), *(p for p, _ in given.end_to_end)])
        self.workload.write_text(json.dumps(outputs.text_workload(LENGTHS, longest, ids)) + "\n")
        self.reference = given.output / f"{self.name}-reference.json"
        given.output.mkdir(parents=True, exist_ok=True)

    def process(self, *command):
        # The binaries may be outside of their checkout.
        environment = {"LAPIDARY_COMMIT": schema.commit()} | os.environ
        done = subprocess.run(list(map(str, command)), stdout=sys.stderr, env=environment)
        if done.returncode != 0:
            raise Unusable(f"{' '.join(Path(str(part)).name for part in command[:3])} … ended with {done.returncode}")

    def cases(self):
        join = lambda pairs: ",".join(f"{a}:{b}" for a, b in pairs)
        given = self.given
        return ["--prefill", ",".join(map(str, given.prefill)), "--live", ",".join(map(str, given.live)),
                "--end-to-end", join(given.end_to_end), "--runs", given.runs, "--decode-samples", given.decode_samples]  # fmt: skip

    def package(self, dtype):
        folder = self.scratch / dtype
        if not folder.exists():
            capacities = sorted({256, 1024, *(n + 16 for n in self.given.live if n + 16 > 1024)})
            self.process(self.lapidary, "convert", self.model, "-o", folder, "--dtype", dtype, "--target", "cpu",
                         "--capacity", ",".join(map(str, capacities)))  # fmt: skip
        return folder

    def checkpoint(self):
        """The same weights as a Hugging Face folder."""
        folder = self.scratch / "checkpoint"
        if not folder.exists():
            self.process(self.lapidary, "weights", self.package("fp32"), "--export", folder)
            (folder / "config.json").write_text((self.given.model / "config.json").read_text())
        return folder

    def systems(self):
        """Name and a function that measures once into a file: `(file, with outputs)`."""
        threads, given = ["--threads", self.given.threads], self.given
        shared = [*threads, "--model-name", self.name, *self.cases()]

        def ours(dtype):
            def measure(file, outputs_too):
                self.process(self.lapidary, "bench", self.package(dtype), "-o", file, "--device", "cpu", "--prompts",
                             self.workload, *shared, "--outputs", outputs.GREEDY if outputs_too else 0, "--label",
                             f"Lapidary {dtype}", "--repetitions", given.prefill_samples)  # fmt: skip
            return measure

        def baseline(python, script, *more):
            def measure(file, outputs_too):
                self.process(python, HERE / script, *more, "--workload", self.workload, "-o", file, *shared, "--outputs",
                             int(outputs_too), "--prefill-samples", given.prefill_samples)  # fmt: skip
            return measure

        found = {"lapidary-fp16": ours("fp16"), "lapidary-fp32": ours("fp32"),
                 "onnxruntime": baseline(sys.executable, "onnxruntime_baseline.py", self.model)}  # fmt: skip
        tract = given.binaries / "examples" / "tract_baseline"
        if tract.exists():
            found["tract"] = baseline(sys.executable, "tract_baseline.py", self.model, "--binary", tract)
        else:
            note(f"tract is left out: {tract} is not built")
        if given.torch_python:
            for mode in given.modes:
                found[f"transformers-{mode}"] = baseline(
                    given.torch_python, "transformers_baseline.py", mode, "--model", self.checkpoint(), "--device", "cpu",
                    "--dtype", "fp32", "--label", f"transformers {mode} fp32")  # fmt: skip
        else:
            note("transformers is left out: no --torch-python")
        return {name: measure for name, measure in found.items() if not any(skip in name for skip in given.skip)}

    def make_reference(self):
        if self.given.torch_python:
            self.process(self.given.torch_python, HERE / "transformers_baseline.py", "reference", "--model",
                         self.checkpoint(), "--model-name", self.name, "--device", "cpu", "--dtype", "fp32", "--workload",
                         self.workload, "-o", self.reference, "--threads", self.given.threads)  # fmt: skip
        else:
            note("the reference is ONNX Runtime")
            self.process(sys.executable, HERE / "onnxruntime_baseline.py", self.model, "--workload", self.workload, "-o",
                         self.reference, "--as-reference", "--prefill", "", "--live", "", "--end-to-end", "", "--threads",
                         self.given.threads, "--model-name", self.name, "--label", "ONNX Runtime as reference")  # fmt: skip

    @staticmethod
    def one_bandwidth(documents):
        """Shares of one bandwidth: the best that any process measured, since other load on the machine varies."""
        best = max(document["machine"]["copy_bandwidth_bytes_per_s"] for document in documents)
        for document in documents:
            before = document["machine"]["copy_bandwidth_bytes_per_s"]
            document["machine"]["copy_bandwidth_bytes_per_s"] = best
            for entry in document["decode"]:
                entry["mbu"] = entry["mbu"] and entry["mbu"] * before / best

    def all(self):
        systems = self.systems()
        self.make_reference()
        rounds = {name: [] for name in systems}
        for i in range(self.given.rounds):
            for name, measure in systems.items():
                note(f"round {i + 1} of {self.given.rounds}: {name}")
                file = self.scratch / f"{name}-{i}.json"
                measure(file, i == 0)
                rounds[name].append(json.loads(file.read_text()))
                if i == 0 and "error" not in rounds[name][0]:
                    # Report a wrong answer before hours are spent on measuring speed.
                    fill(file, self.reference)
                    rounds[name][0] = json.loads(file.read_text())
        equal = True
        # Reports use shares of the reference's bandwidth.
        reference = json.loads(self.reference.read_text())
        self.one_bandwidth([reference, *(d for documents in rounds.values() for d in documents if "error" not in d)])
        schema.write(self.reference, reference)
        for name, documents in rounds.items():
            broken = next((d for d in documents if "error" in d), None)
            document = broken or schema.merged(documents)
            equal &= broken is None and document["outputs"]["reference"]["equal"]
            schema.write(self.given.output / f"{self.name}-{name}.json", document)
        return equal


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--model", type=Path, default=ROOT / "fixtures/smollm2", help="an optimum export; default: %(default)s")
    parser.add_argument("--binaries", type=Path, default=ROOT / "target/release")
    parser.add_argument("--torch-python", type=Path, help="a Python with torch and transformers")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["eager"], help="of transformers")
    parser.add_argument("--skip", action="append", default=[], help="leave systems of this name out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=schema.numbers, default=[37, 512], metavar="N,N")
    parser.add_argument("--live", type=schema.numbers, default=[37, 512], metavar="N,N")
    parser.add_argument("--end-to-end", type=schema.pairs, default=[(37, 64)], metavar="PROMPT:NEW,…")
    parser.add_argument("--runs", type=int, default=2, help="end to end, a round")
    parser.add_argument("--prefill-samples", type=int, default=4, help="a round")
    parser.add_argument("--decode-samples", type=int, default=32, help="a round")
    return parser.parse_args()


def main():
    given = arguments()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return 0 if Run(given, Path(scratch)).all() else 1
    except (Unusable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
