"""From a shape and an exporter to a finished folder: model, export, reference.json, all or nothing."""

import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from . import families, reference


def export(name, shape, exporter, run, target, failures):
    """Make `target/name` with `run`, an exporter's function; a refusal goes to `failures`, by name."""
    folder = target / name
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, built = Path(scratch) / "checkpoint", Path(scratch) / name
        model, seed = families.build(shape)
        families.save(model, shape, checkpoint)
        try:
            form = run(model, checkpoint, built, shape)
            facts = reference.record(built, exporter, form, model, shape, seed)
        except Exception as error:  # noqa: BLE001 - an exporter that refuses a family is a finding, not the end
            traceback.print_exc(limit=-3)
            reason = str(error).strip().splitlines()[-1].replace(scratch, "SCRATCH")
            failures[name] = f"{type(error).__name__}: {reason[:300]}"
            print(f"{name}: FAILED {failures[name]}", file=sys.stderr)
            return
        shutil.copytree(built, folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) // 1024
    print(f"{name}: {size} KiB, {facts['engine']}, torch difference {facts['torch_max_difference']}", file=sys.stderr)
