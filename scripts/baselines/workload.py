#!/usr/bin/env python3
"""Makes the workload file for all systems of a comparison: see outputs.py.

    workload.py WORKLOAD.json --vocabulary 32000                 random ids, for made models
    workload.py WORKLOAD.json --ids-from fixtures/smollm2/reference.json
"""

import argparse
import json
import sys
from pathlib import Path

from outputs import made_workload, text_workload

PROMPTS = [1, 17, 128, 129, 700]
TIMED = 4096


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vocabulary", type=int, help="draw ids below this")
    source.add_argument("--ids-from", type=Path, help="a JSON file with a `prompt` of real ids")
    parser.add_argument("--prompts", default=",".join(map(str, PROMPTS)), help="lengths; default: %(default)s")
    parser.add_argument("--timed", type=int, default=TIMED, help="length; default: %(default)s")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    lengths = [int(n) for n in arguments.prompts.split(",")]
    if arguments.vocabulary:
        workload = made_workload(lengths, arguments.timed, arguments.vocabulary, arguments.seed)
    else:
        workload = text_workload(lengths, arguments.timed, json.loads(arguments.ids_from.read_text())["prompt"])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(workload) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
