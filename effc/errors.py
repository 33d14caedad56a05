"""The one exception a user can mend, and the nearest-name hint every message ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffcError(Exception):
    """Something the user can mend: printed as one line, exit code 1, no traceback."""


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `words`, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
