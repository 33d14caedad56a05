"""The one exception a user can mend, and the nearest-name hint every message ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class EffcError(Exception):
    """Something the user can mend: printed as one line, exit code 1, no traceback."""


def check_exists(path: Path, where: str = "") -> None:
    """EffcError for a file or folder that is not there, with the nearest name beside it."""
    if path.exists():
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    told = f"{where}: " if where else ""
    raise EffcError(f"{told}{path}: no such file or folder{nearest(path.name, siblings)}")


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `words`, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
