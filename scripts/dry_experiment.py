#!/usr/bin/env python3
"""Effect and cost of DRY on SmolLM2-135M's long texts: generations of several prompts and seeds with and
without it, as a table and a plot.

    scripts/dry_experiment.py --package .models/smollm2-cpu              # generates, measures, writes everything
    scripts/dry_experiment.py --package .models/smollm2-cpu --cost       # only times, into the existing results
    scripts/dry_experiment.py --from benches/results/dry-smollm2.json    # table and plot again, from old results

Each text is TOKENS long: the model's end tokens are banned (`--logit-bias ID=-inf`), because a small model that may stop
hides its repetitions behind an early end. Measured on the generated tokens alone:

- distinct-n: different n-grams over all n-grams. 1 means no repetition; ordinary prose of this length is near it.
- longest repeated span: the longest sequence of tokens that occurs twice in the text (the two may overlap).
- cost: mean time of the sampler chain for one token, and of a whole token, in one text per setting. Measure it on an
  otherwise idle machine (`--cost` does only this part).

Writes the results (JSON), the plot (SVG), and the table between the markers of docs/guides/sampling.md. Needs the release binary
(`cargo build --release --bins`) and a package of SmolLM2; nothing but Python's standard library.
"""

import argparse
import concurrent.futures
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 256
SEEDS = [1, 2]
# The chat template's end and the end of a document.
BANNED = [0, 2]
PROMPTS = {
    "story": "Once upon a time, in a village at the foot of a mountain, there lived an old clockmaker.",
    "essay": "The history of the printing press begins long before Gutenberg.",
    "list": "Here is a list of things to do on a rainy day:\n1.",
    "code": 'def parse_config(path):\n    """Reads a configuration file."""\n',
    "dialogue": "Anna: Did you hear the news?\nBen: No, what happened?\nAnna:",
}
DRY = ["--dry-multiplier", "0.8"]
PENALTY = ["--repetition-penalty", "1.1"]
# Name, flags, seeds. What is not said is `generate`'s default: top-k 40, top-p 0.95, min-p 0.05.
SETTINGS = [
    ("greedy", ["--temperature", "0"], SEEDS[:1]),
    ("greedy + DRY", ["--temperature", "0", *DRY], SEEDS[:1]),
    ("t 0.4", ["--temperature", "0.4"], SEEDS),
    ("t 0.4 + DRY", ["--temperature", "0.4", *DRY], SEEDS),
    ("t 0.8", ["--temperature", "0.8"], SEEDS),
    ("t 0.8 + DRY", ["--temperature", "0.8", *DRY], SEEDS),
    ("t 0.8 + rep. penalty 1.1", ["--temperature", "0.8", *PENALTY], SEEDS),
]


def distinct(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)


def longest_repeat(tokens):
    """Length of the longest sequence that occurs twice: by bisection, since a repeat contains all shorter ones."""

    def repeats(n):
        seen = set()
        for i in range(len(tokens) - n + 1):
            gram = tuple(tokens[i : i + n])
            if gram in seen:
                return True
            seen.add(gram)
        return False

    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if repeats(middle) else (low, middle - 1)
    return low


def generate(args, prompt, flags, seed, threads=None):
    command = [args.lapidary, "generate", args.package, "--prompt", prompt, "--json", "--seed", seed]
    command += ["--max-new-tokens", args.tokens, "--ignore-eos", "--device", "cpu"]
    command += ["--threads", threads] if threads else []
    command += [part for token in BANNED for part in ("--logit-bias", f"{token}=-inf")]
    done = subprocess.run([str(c) for c in command + flags], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(done.stdout)


def one(args, setting, flags, name, seed):
    """One text, on one thread: the tokens do not depend on their number."""
    result = generate(args, PROMPTS[name], flags, seed, threads=1)
    tokens = result["tokens"]
    run = {"setting": setting, "prompt": name, "seed": seed, "tokens": len(tokens)}
    run |= {f"distinct_{n}": round(distinct(tokens, n), 4) for n in (1, 2, 3, 4)}
    run |= {"longest_repeat": longest_repeat(tokens), "text": result["text"]}
    print(f"{setting}, {name}, seed {seed}: distinct-3 {run['distinct_3']}, longest repeat {run['longest_repeat']}",
          file=sys.stderr)
    return run


def measure(args):
    tasks = [(setting, flags, name, seed) for setting, flags, seeds in SETTINGS for name in PROMPTS for seed in seeds]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda task: one(args, *task), tasks))
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "experiment": "dry-smollm2",
        "model": "SmolLM2-135M-Instruct",
        "machine": {"cpu": cpu, "system": platform.platform()},
        "commit": commit,
        "tokens": args.tokens,
        "prompts": PROMPTS,
        "settings": {name: flags for name, flags, _ in SETTINGS},
        "runs": runs,
        "cost": cost(args),
    }


def cost(args):
    """Microseconds of sampling and milliseconds in all for a token, by setting."""
    out = {}
    for setting, flags, seeds in SETTINGS:
        timing = generate(args, PROMPTS["story"], flags, seeds[0])["timing"]
        out[setting] = {"sampling_us": round(timing["sampling_ms"] * 1e3, 1), "token_ms": round(timing["tpot_ms"], 2)}
    return out


def of(results, setting, field):
    return [run[field] for run in results["runs"] if run["setting"] == setting]


def table(results):
    lines = [
        "| setting | texts | distinct-1 | distinct-2 | distinct-3 | distinct-4 | longest repeated span, median (worst) "
        "| sampling, a token | all, a token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in results["settings"]:
        spans = of(results, setting, "longest_repeat")
        means = " | ".join(f"{statistics.mean(of(results, setting, f'distinct_{n}')):.3f}" for n in (1, 2, 3, 4))
        lines.append(
            f"| {setting} | {len(spans)} | {means} | {statistics.median(spans):.0f} ({max(spans)}) tokens "
            f"| {results['cost'][setting]['sampling_us']:.0f} µs | {results['cost'][setting]['token_ms']:.1f} ms |"
        )
    return "\n".join(lines) + "\n"


def plot(results):
    """Two panels, a row a setting: a dot a text, and a bar at the median."""
    settings = list(results["settings"])
    row, top, left, width, gap = 34, 64, 190, 270, 40
    height = top + row * len(settings) + 46
    total = left + 2 * width + gap + 30
    panels = [
        ("distinct-3 (higher is better)", "distinct_3", lambda v: v, [0, 0.25, 0.5, 0.75, 1]),
        # A square root leaves room for the small values without hiding the large ones.
        ("longest repeated span, tokens (lower is better)", "longest_repeat",
         lambda v: (v / results["tokens"]) ** 0.5, [0, 10, 50, 100, 200]),
    ]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#222">',
        f'<rect width="{total}" height="{height}" fill="#fff"/>',
        f'<text x="16" y="24" font-size="15" font-weight="bold">Repetition in {results["tokens"]}-token texts of '
        f'{results["model"]}, with and without DRY</text>',
    ]
    bottom = top + row * len(settings)
    for i, setting in enumerate(settings):
        y = top + row * (i + 0.5)
        weight = ' font-weight="bold"' if "DRY" in setting else ""
        out.append(f'<text x="{left - 14}" y="{y + 4}" text-anchor="end"{weight}>{setting}</text>')
    for p, (title, field, scale, ticks) in enumerate(panels):
        x0 = left + p * (width + gap)
        out.append(f'<text x="{x0}" y="{top - 12}">{title}</text>')
        for tick in ticks:
            x = x0 + width * scale(tick)
            out.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
            out.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#666">{tick}</text>')
        for i, setting in enumerate(settings):
            y = top + row * (i + 0.5)
            color = "#1b7837" if "DRY" in setting else "#b2182b"
            values = of(results, setting, field)
            for j, value in enumerate(values):
                jitter = (j % 5 - 2) * 3
                out.append(f'<circle cx="{x0 + width * scale(value):.1f}" cy="{y + jitter}" r="3" fill="{color}" '
                           f'fill-opacity="0.45"/>')
            x = x0 + width * scale(statistics.median(values))
            out.append(f'<line x1="{x:.1f}" y1="{y - 12}" x2="{x:.1f}" y2="{y + 12}" stroke="{color}" '
                       f'stroke-width="3"/>')
    out.append(f'<text x="{left}" y="{height - 8}" fill="#666">a dot a text, a bar at the median; five prompts, two '
               f"seeds (greedy: one text a prompt)</text>")
    return "\n".join([*out, "</svg>", ""])


def insert(page, text):
    """Puts the table between its markers."""
    before, rest = page.read_text().split("<!-- dry table -->\n")
    _, after = rest.split("<!-- end -->\n")
    page.write_text(f"{before}<!-- dry table -->\n{text}<!-- end -->\n{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path)
    parser.add_argument("--from", dest="old", type=Path, help="results of an earlier run")
    parser.add_argument("--cost", action="store_true", help="measure only times, and put them into the results")
    parser.add_argument("--lapidary", type=Path, default=ROOT / "target/release/lapidary")
    parser.add_argument("--jobs", type=int, default=2, help="texts generated at the same time")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benches/results/dry-smollm2.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/dry-smollm2.svg")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/guides/sampling.md")
    args = parser.parse_args()
    if (args.package is None) == (args.old is None):
        parser.error("give either --package or --from")
    if args.old:
        results = json.loads(args.old.read_text())
    else:
        results = json.loads(args.output.read_text()) | {"cost": cost(args)} if args.cost else measure(args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    args.plot.write_text(plot(results))
    insert(args.page, table(results))
    print(table(results))


if __name__ == "__main__":
    main()
