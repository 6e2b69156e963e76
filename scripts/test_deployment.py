#!/usr/bin/env python3
"""Tests packaging/lapidary.service and packaging/Dockerfile without systemd as the first process and without a container registry.

Usage: scripts/test_deployment.py BINARY [--build]

The unit: `systemd-analyze verify` and `security`; then its ExecStart runs with its EnvironmentFile, as a user without privileges, until
SIGTERM. The Dockerfile: its last stage is built in a folder, from the Debian packages of its FROM line, by its own RUN and COPY steps, and
its ENTRYPOINT and HEALTHCHECK run there as its USER. BINARY stands for the result of the build stage; with --build the build command
runs on this machine, in a copy of the build context. Needs root, debootstrap and systemd-analyze; `source scripts/setup.sh deployment`
installs the last two.
"""

import argparse
import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
UNIT = ROOT / "packaging/lapidary.service"
DOCKERFILE = ROOT / "packaging/Dockerfile"
# What `systemd-analyze security` may give at most, of 100.
EXPOSURE = 25
UNPRIVILEGED_ID = 65534


class Checks:
    passed = 0

    def __call__(self, what, holds, *details):
        if not holds:
            sys.exit(f"FAILED: {what} {' '.join(map(str, details))}")
        self.passed += 1
        print(f"ok {what}", flush=True)


check = Checks()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command, **options):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options)
    if done.returncode != 0:
        sys.exit(f"FAILED: {shlex.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def serves(what, process, port):
    """The server answers a request, and ends by SIGTERM with status 0."""
    end = time.time() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                check(f"{what}: /health", reply.status == 200, reply.status)
            break
        except OSError as error:
            if process.poll() is not None or time.time() > end:
                sys.exit(f"FAILED: {what}: no server: {error}, exit status {process.poll()}")
            time.sleep(0.1)
    body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        document = json.loads(reply.read())
    check(f"{what}: four tokens", len(document["choices"][0]["token_ids"]) == 4, document)


def stops(what, process):
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(45)
    except subprocess.TimeoutExpired:
        process.kill()
        status = "none within 45 s"
    check(f"{what}: SIGTERM ends it with status 0", status == 0, status)


def settings(text):
    """Key and value of every line of a unit or of an environment file."""
    pairs = [line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith(("#", "["))]
    return {key: value for key, value in pairs}


def test_unit(binary, package, folder):
    unit = UNIT.read_text()
    keys = settings(unit)
    command = shlex.split(keys["ExecStart"])
    # verify looks for the program and for files by their paths.
    installed = folder / "units"
    installed.mkdir()
    copy = installed / UNIT.name
    copy.write_text(unit.replace(command[0], str(binary)))
    warnings = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], text=True, capture_output=True, check=False)
    own = [line for line in warnings.stderr.splitlines() if UNIT.name in line or str(copy) in line]
    check("unit: systemd-analyze verify", not own and warnings.returncode == 0, warnings.stderr)
    page = run(["systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE}", str(copy)])
    check("unit: systemd-analyze security", True)
    print("  ", page.strip().splitlines()[-1])

    environment = settings((ROOT / "packaging/serve.env").read_text())
    check("unit: serve.env has what ExecStart names", {"LAPIDARY_PACKAGES", "LAPIDARY_FLAGS"} == set(environment), environment)
    port = free_port()
    environment["LAPIDARY_PACKAGES"] = str(package)
    flags = environment["LAPIDARY_FLAGS"]
    check("unit: serve.env has the default port", "--port 8080" in flags, flags)
    environment["LAPIDARY_FLAGS"] = flags.replace("--port 8080", f"--port {port}")
    words = []
    # As in systemd: a variable that is a whole word expands to words.
    for word in command[1:]:
        words += environment[word[1:]].split() if word.startswith("$") else [word]
    process = subprocess.Popen(
        ["setpriv", f"--reuid={UNPRIVILEGED_ID}", f"--regid={UNPRIVILEGED_ID}", "--clear-groups", "--no-new-privs", str(binary), *words],
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        stderr=subprocess.DEVNULL,
    )
    serves("unit", process, port)
    stops("unit", process)
    wrong = run_status(binary, ["serve", "/nowhere"])
    check("unit: a wrong package has the status that is not restarted", str(wrong) == keys["RestartPreventExitStatus"], wrong)


def run_status(binary, words):
    return subprocess.run([binary, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


def stages(text):
    """For each FROM, its image and its steps as (instruction, rest)."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        instruction, rest = line.split(None, 1)
        if instruction == "FROM":
            found.append((rest.split()[0], []))
        else:
            found[-1][1].append((instruction, rest.strip()))
    return found


def context(folder):
    """The build context: files that git has, without those of .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]

    def is_ignored(path):
        for pattern in patterns:
            if pattern.startswith("**/"):
                if any(fnmatch.fnmatch(part, pattern[3:]) for part in path.split("/")):
                    return True
            elif fnmatch.fnmatch(path.split("/")[0], pattern[1:]) or path.startswith(f"{pattern[1:]}/"):
                return True
        return False

    names = run(["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]).splitlines()
    for name in names:
        if not is_ignored(name) and (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)


def built(steps, binary, folder, builds):
    """What the build stage gives, as a path."""
    arguments = dict(rest.split("=", 1) for instruction, rest in steps if instruction == "ARG")
    command = next(rest for instruction, rest in steps if instruction == "RUN" and rest.startswith("cargo build"))
    here = folder / "context"
    context(here)
    # Cargo reads every target that the manifest names, and features are those it has.
    features = arguments["FEATURES"].split(",")
    described = json.loads(run(["cargo", "metadata", "--no-deps", "--locked", "--offline", "--format-version=1"], cwd=here))
    package = next(package for package in described["packages"] if package["name"] == "lapidary")
    check("image: the context has all targets of the manifest", all(pathlib.Path(t["src_path"]).is_file() for t in package["targets"]))
    check("image: its features are there", set(features) <= set(package["features"]), features)
    if not builds:
        return binary
    environment = {**os.environ, **arguments}
    run(["sh", "-c", command], cwd=here, env=environment)
    check("image: the build command", True)
    return here / "target/release/lapidary"


def test_image(binary, package, folder, builds):
    (build_image, build_steps), (image, steps) = stages(DOCKERFILE.read_text())
    toolchain = re.search(r'rust-version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text())[1]
    check("image: the toolchain is the one of Cargo.toml", build_image.startswith(f"rust:{toolchain}-"), build_image, toolchain)
    release = re.fullmatch(r"debian:(\w+)-slim", image)[1]
    here = dict(line.split("=", 1) for line in pathlib.Path("/etc/os-release").read_text().splitlines() if "=" in line)
    if here.get("VERSION_CODENAME") != release:
        print(f"not tested: {image} on this machine, whose C library a binary made here needs")
        return
    program = built(build_steps, binary, folder, builds)
    root = folder / "root"
    run(["debootstrap", "--variant=minbase", release, str(root)])
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    shutil.copytree(package, root / "models/pkg")
    user, health, entry = "root", None, None
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
    environment.update({name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")})

    def inside(command, **options):
        return ["chroot", *([f"--userspec={options['user']}"] if "user" in options else []), str(root), *command]

    for instruction, rest in steps:
        match instruction:
            case "RUN":
                run(inside(["sh", "-c", rest]), env=environment)
            case "COPY":
                source, target = rest.removeprefix("--from=build ").split()
                check("image: COPY takes the program", source == "/src/target/release/lapidary", source)
                shutil.copy(program, root / target[1:])
            case "USER":
                user = rest
            case "HEALTHCHECK":
                health = json.loads(rest[rest.index("CMD") + 3 :])
            case "ENTRYPOINT":
                entry = json.loads(rest)
            case "CMD":
                check("image: without a package it shows its help", "--help" in json.loads(rest), rest)
            case "EXPOSE" | "STOPSIGNAL":
                pass
            case _:
                sys.exit(f"FAILED: {DOCKERFILE} has {instruction}, which this script does not know")
    check("image: its steps", health and entry and user != "root", health, entry, user)
    page = run(inside([*entry, "--help"], user=user), env=environment)
    check("image: its help", "--max-sequences" in page, page)
    port = free_port()
    # The image's port is the host's port here: there is no separate network.
    moved = [word if word != "8080" else str(port) for word in entry]
    health = [word.replace("/8080", f"/{port}") for word in health]
    check("image: the entry point and the health check have one port", str(port) in moved and str(port) in health[-1])
    check("image: the health check fails without a server", subprocess.run(inside(health), env=environment, stderr=subprocess.DEVNULL, check=False).returncode != 0)
    process = subprocess.Popen(inside([*moved, "/models/pkg", "--device", "cpu"], user=user), env=environment)
    serves("image", process, port)
    run(inside(health, user=user), env=environment)
    check("image: the health check", True)
    owner = pathlib.Path(f"/proc/{process.pid}").stat().st_uid
    check("image: it does not run as root", owner != 0, owner)
    stops("image", process)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--build", action="store_true", help="run the image's build command, too")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("this script needs root, for chroot and another user")
    with tempfile.TemporaryDirectory(prefix="lapidary-deployment-") as name:
        folder = pathlib.Path(name)
        # Other users read the program and the package.
        folder.chmod(0o755)
        binary = folder / "lapidary"
        shutil.copy(arguments.binary, binary)
        package = folder / "pkg"
        export = ROOT / "fixtures/exports/llama-optimum/model.onnx"
        run([str(binary), "convert", str(export), "-o", str(package), "--capacity", "64"])
        test_unit(binary, package, folder)
        test_image(binary, package, folder, arguments.build)
    print(f"{check.passed} passed, 0 failed")


main()
