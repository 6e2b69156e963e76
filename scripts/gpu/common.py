"""Common code of this folder's scripts: the binaries and their calls, and one JSON file of results."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(os.environ.get("LAPIDARY_BIN", "/tmp/lapidary-gpu"))
WORK = Path(os.environ.get("LAPIDARY_WORK", "/tmp/lapidary-work"))
# One engine cache for every package: a plan is found by its network, so what was built elsewhere (prebuild.py) serves all stages.
PLANS = WORK / "plans"


def export_of(size, form=""):
    """Where the export of a made model is; the stages share it."""
    return WORK / "exports" / "-".join(filter(None, [size, form])) / "model.onnx"


def run(*command, check=True, timeout=600):
    """The command's standard output; its standard error goes into the exception."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        words = (done.stderr or done.stdout).strip()[-1500:]
        raise RuntimeError(f"{' '.join(command[:3])} … ended with {done.returncode}: {words}")
    return done.stdout if check else done


def lapidary(*arguments, **options):
    return run(BIN / "lapidary", *arguments, **options)


def lab(*arguments, **options):
    return json.loads(run(BIN / "gpu_lab", *arguments, **options))


def note(*words):
    print(f"[{time.strftime('%H:%M:%S')}]", *words, flush=True)


class Results:
    """A JSON file that is rewritten after every entry, so that an interrupted run keeps its results."""

    def __init__(self, path):
        self.path, self.values = Path(path), {}

    def __setitem__(self, key, value):
        self.values[key] = value
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")

    def attempt(self, key, function, *arguments, **options):
        """Records the function's result or error, and its time."""
        note(key, "…")
        start = time.time()
        try:
            value = function(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - one failure must not end a run on a borrowed machine
            value = {"error": f"{type(error).__name__}: {error}"[:3000]}
            print(f"  {key}: {value['error']}", file=sys.stderr, flush=True)
        self[key] = value
        note(key, f"took {time.time() - start:.1f} s")
        return value


def machine():
    """GPU, driver, library and commit. What needs torch alone runs before the binaries are there."""
    facts = json.loads(lapidary("doctor", "--json")) if (BIN / "lapidary").exists() else {"tensorrt": {"library": None}}
    smi = run("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv,noheader")
    commit = ROOT / ".gpu" / "commit"
    tensorrt = facts["tensorrt"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "nvidia_smi": smi.strip(),
        "tensorrt": (tensorrt["library"] or {}).get("version"),
        "doctor": {key: tensorrt.get(key) for key in ("build", "build_refittable", "run", "driver")},
        "commit": commit.read_text().strip() if commit.exists() else None,
    }
