"""Watching the text of growing token lists for stop strings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

Decoder = Callable[[Sequence[int]], str]
"""Token ids to text."""

BROKEN = "\ufffd"
"""What decoders give for bytes that are no whole character yet."""

_BACK = 16
"""Tokens decoded again with each new one: enough for any character and for joins between words."""


class Watch:
    """The text of one row. It never holds any of a stop string once that is found."""

    def __init__(self, decode: Decoder | None, stop: Sequence[str] = ()):
        self.text = ""
        self._decode, self._stop = decode, [s for s in stop if s]
        self._ends: list[int] = []  # length of the text after each token

    def see(self, tokens: Sequence[int]) -> int | None:
        """Take in the tokens past those seen; how many to keep if a stop string is there, else None."""
        if self._decode is None:
            return None
        for count in range(len(self._ends) + 1, len(tokens) + 1):
            self._grow(tokens[:count])
            found = self._find()
            if found is not None:
                self.text = self.text[:found]
                return sum(1 for end in self._ends if end <= found)
        return None

    def safe(self, count: int) -> int:
        """How many of `count` tokens seen end before anything that may become a stop string."""
        if not self._stop:
            return count
        tails = (len(stop[:n]) for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        limit = len(self.text) - max(tails, default=0)
        return sum(1 for end in self._ends[:count] if end <= limit)

    def _grow(self, tokens: Sequence[int]) -> None:
        """Decode the last few tokens again: what a token prints may depend on those before it."""
        assert self._decode is not None
        first = max(0, len(tokens) - 1 - _BACK)
        known, whole = self._decode(tokens[first:-1]), self._decode(tokens[first:])
        # Begins with a broken character where the cut is in one.
        same = len(os.path.commonprefix([known, whole]))  # noqa: RUF071, of characters is what is wanted
        self.text = self.text[: len(self.text) - len(known) + same] + whole[same:]
        self._ends.append(len(self.text))

    def _find(self) -> int | None:
        """Where the first stop string begins."""
        found = [at for at in (self.text.find(stop) for stop in self._stop) if at >= 0]
        return min(found, default=None)
