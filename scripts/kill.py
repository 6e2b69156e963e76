#!/usr/bin/env python3
"""Kills `convert`, `strip`, `refit` and the cache of plans at random moments and checks the files that remain.

    scripts/kill.py [KILLS] [LAPIDARY]

After every kill the package must be the complete old one or the complete new one: `weights` says one of the two set hashes, every hash in
the manifest is that of its file, and it generates the tokens of that weight set. Stale temporary files must be
removed when the same command has run again. With TENSORRT_RTX_LIB, engines are built through a cache of plans as well. Exits with 1
otherwise. Needs no more than Python.
"""
import json, os, pathlib, random, shutil, signal, subprocess, sys, tempfile, time

ROOT = pathlib.Path(__file__).resolve().parent.parent
KILLS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
LAPIDARY = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "target/release/lapidary").resolve()
EXPORTS = ROOT / "fixtures/exports"
PROMPT = ["--prompt-ids", "5,17,3,60,22", "--max-new-tokens", "6", "--temperature", "0"]


def run(*arguments):
    done = subprocess.run([LAPIDARY, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def state(package):
    """The weight set, and the tokens where there are weights."""
    listed = json.loads(run("weights", package, "--json"))
    run("info", package)
    if listed["stripped"]:
        return listed["set_hash"], "stripped"
    return listed["set_hash"], run("generate", package, *PROMPT).strip()


def kill_at(moment, *arguments):
    """Whether the process was killed before it was done."""
    process = subprocess.Popen([LAPIDARY, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def duration(*arguments):
    start = time.monotonic()
    run(*arguments)
    return time.monotonic() - start


def main():
    random.seed(int(os.environ.get("SEED", "0")))
    folder = pathlib.Path(tempfile.mkdtemp(prefix="lapidary-kill-"))
    os.chdir(folder)
    model, other = EXPORTS / "llama-optimum/model.onnx", EXPORTS / "llama-mobius/model.onnx"
    run("convert", model, "-o", "one", "--capacity", "32")
    # The same architecture with other numbers: the head times two.
    run("weights", "one", "--export", "tune")
    data = bytearray((folder / "tune/model.safetensors").read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    start, end = header["lm_head.weight"]["data_offsets"]
    for at in range(8 + size + start, 8 + size + end, 4):
        data[at + 3] ^= 0x80
    (folder / "tune/model.safetensors").write_bytes(data)
    run("strip", "one", "-o", "two")
    run("refit", "two", "--from", "tune")
    wanted = {name: state(name) for name in ("one", "two")}
    assert wanted["one"] != wanted["two"]

    def fresh(target, source):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)

    commands = {
        "refit": (lambda: fresh("target", "one"), ["refit", "target", "--from", "tune"], ("one", "two")),
        "refit through a link": (lambda: fresh("target", "one"), ["refit", "link", "--from", "tune"], ("one", "two")),
        "convert": (lambda: fresh("target", "two"), ["convert", model, "-o", "target", "--capacity", "32", "--force"], ("two", "one")),
        "strip": (lambda: fresh("target", "two"), ["strip", "one", "-o", "target", "--force"], ("two", "stripped")),
        "convert to a new name": (lambda: shutil.rmtree("target", ignore_errors=True), ["convert", model, "-o", "target", "--capacity", "32"], (None, "one")),
    }
    if "TENSORRT_RTX_LIB" in os.environ:
        engines = ["--target", "cpu,tensorrt-rtx", "--engine-cache", "plans"]
        commands["cache of plans"] = (
            lambda: [shutil.rmtree(name, ignore_errors=True) for name in ("target", "plans")],
            ["convert", model, "-o", "target", "--capacity", "32", *engines],
            (None, "one"),
        )
    os.symlink("target", "link")
    wanted["stripped"] = (wanted["one"][0], "stripped")
    counts = {}
    wrong = 0
    total = number = 0
    # Some processes are done before they are killed: they count for nothing.
    while total < KILLS:
        name = list(commands)[number % len(commands)]
        number += 1
        prepare, command, (before, after) = commands[name]
        prepare()
        if name not in counts:
            counts[name] = [duration(*command), 0, 0, 0]
            prepare()
        # Some beyond its end, to meet the last steps as well.
        killed = kill_at(random.uniform(0, counts[name][0] * 1.1), *command)
        counts[name][1] += killed
        total += killed
        found = state("target") if pathlib.Path("target").exists() else None
        expected = [wanted.get(before), wanted[after]]
        if found not in expected:
            print(f"{name}: {found} is neither {expected[0]} nor {expected[1]}")
            wrong += 1
        counts[name][2 if found == expected[0] else 3] += 1
        if not os.path.islink("link"):
            print(f"{name}: the link is gone")
            wrong += 1
        # Once more: nothing of the killed process may stay.
        run(*command, *(["--force"] if before is None and found else []))
        places = [folder, folder / "plans"] if (folder / "plans").is_dir() else [folder]
        left = sorted(p.name for place in places for p in place.iterdir() if ".lapidary-" in p.name)
        if left or state("target") != wanted[after]:
            print(f"{name}: left behind: {left}")
            wrong += 1
    for name, (seconds, killed, old, new) in counts.items():
        print(f"{name}: {seconds:.2f} s, killed {killed} times; {old} times the old package, {new} times the new one")
    shutil.rmtree(folder)
    print(f"{total} kills, {wrong} wrong")
    sys.exit(wrong > 0)


main()
