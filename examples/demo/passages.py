"""The real texts of the demo: Debian's King James Bible and the `science` fortunes."""

import re
import shutil
import subprocess
from pathlib import Path

FORTUNES = Path("/usr/share/games/fortunes")


def _bible(verses):
    program = shutil.which("bible")
    if program is None:
        raise FileNotFoundError("the program `bible` is missing: apt-get install bible-kjv bible-kjv-text")
    lines = subprocess.run([program, "-f", verses], check=True, capture_output=True, text=True).stdout.splitlines()
    return " ".join(re.sub(r"^\S+\d+:\d+\s+", "", line).strip() for line in lines)  # drop the 'Mat1:1 ' before each verse


def _fortunes(name):
    path = FORTUNES / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: apt-get install fortunes")
    return re.sub(r"\n%\n", "\n\n", path.read_text(errors="replace"))


def evaluation_texts():
    """Name -> text that perplexity is measured on, always from its beginning."""
    return {"KJV Matthew": _bible("mat1:1-mat28:20"), "fortunes science": _fortunes("science")}


def calibration_text():
    """Text of both kinds that no evaluation text contains; the mixed-width setting picks its widths by it."""
    return [_bible("gen1:1-gen3:24"), _fortunes("people")]


def windows(tokenizer, text, count, length):
    """The first `count` windows of `length` tokens, [count, length]."""
    ids = tokenizer(text[: count * length * 12], return_tensors="pt").input_ids[0]
    if ids.numel() < count * length:
        raise ValueError(f"the text has {ids.numel()} tokens, {count} windows of {length} need {count * length}")
    return ids[: count * length].view(count, length)
