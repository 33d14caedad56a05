"""Which part of --calib exits learn from, and which thresholds are calibrated on."""

from __future__ import annotations

TRAINED_ON = 0.6
"""Share of --calib that exits learn from; thresholds are calibrated on the rest, which they have not seen."""


def part(text: str | None, *, learnt: bool) -> str | None:
    """The part of a text that exits learn from, or the rest."""
    if text is None:
        return None
    cut = int(len(text) * TRAINED_ON)
    return text[:cut] if learnt else text[cut:]
