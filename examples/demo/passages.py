"""The real texts of the demo: Debian's King James Bible and the `science` fortunes."""

import re
from pathlib import Path

from ..texts import verses

FORTUNES = Path("/usr/share/games/fortunes")


def _bible(which):
    return " ".join(verse.text for verse in verses(which))


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
