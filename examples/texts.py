"""The King James Bible by verses, from Debian's packages bible-kjv and bible-kjv-text.

python -m examples.texts FOLDER     writes kjv.txt there, for `--data FOLDER` on a machine without these packages
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FILE = "kjv.txt"
_VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):(\d+)\s+(.*)")


@dataclass(frozen=True)
class Verse:
    book: str  # as the program abbreviates it: Ge, Mat, 1Cor
    chapter: int
    number: int
    text: str


def _print_verses(which):
    program = shutil.which("bible")
    if program is None:
        raise FileNotFoundError("the program `bible` is missing: apt-get install bible-kjv bible-kjv-text")
    return subprocess.run([program, "-f", which], check=True, capture_output=True, text=True).stdout


def verses(which="gen1:1-rev22:21", folder=None):
    """The verses of a passage; the whole Bible, when `folder` holds it as kjv.txt."""
    if folder is None:
        lines = _print_verses(which).splitlines()
    else:
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: write it with python -m examples.texts {folder}")
        lines = path.read_text().splitlines()
    found = []
    for line in lines:
        match = _VERSE.fullmatch(line)
        if match is None:
            raise ValueError(f"{line[:60]!r} is no verse: expected a book, chapter:verse and text")
        found.append(Verse(match[1], int(match[2]), int(match[3]), match[4].strip()))
    return found


def without_books(found, books):
    """(text of all other books, text of these): what a model learns from, and what it is measured on."""
    return tuple(" ".join(v.text for v in found if (v.book in books) == held_out) for held_out in (False, True))


def main(argv):
    if len(argv) != 1:
        sys.exit("usage: python -m examples.texts FOLDER")
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(_print_verses("gen1:1-rev22:21"))
    print(f"{folder / FILE}: {len(verses(folder=folder))} verses")


if __name__ == "__main__":
    main(sys.argv[1:])
