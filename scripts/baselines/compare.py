#!/usr/bin/env python3
"""Fills `outputs.reference` of result files: how far each is from the fp32 reference. The tables are `lapidary report`'s.

    compare.py REFERENCE.json RESULT.json…

Refuses results over other weights or prompts (status 2). Status 1 if an output is not equal within its limit.
"""

import argparse
import json
import sys
from pathlib import Path

import outputs
import schema


def fill(path, reference):
    """`equal`, or None for a system that did not run."""
    values = json.loads(Path(path).read_text())
    if "error" in values:
        return None
    if problems := schema.check(values):
        raise schema.Unusable(f"{path}: " + "; ".join(problems[:5]))
    reference = outputs.reference_of(reference, values["model"]["weights_hash"])
    found = outputs.compare(values["outputs"], values["model"]["dtype"], reference)
    values["outputs"]["reference"] = found
    schema.write(path, values)
    print(f"{values['system']['label']}: {outputs.summary_line(found)}")
    return found["equal"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    try:
        return int(not all([fill(path, arguments.reference) is not False for path in arguments.results]))
    except (schema.Unusable, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
