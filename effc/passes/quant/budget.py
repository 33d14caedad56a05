"""Spending bits: each parameter gets one of several codings, so that the harm is least within a number of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One coding of a parameter: what it takes, and the harm it does."""

    form: str
    nbytes: int
    harm: float


def spend(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice a parameter, at most `budget` bytes in all (or the smallest of all).

    The price of a byte is raised until what is chosen fits, then what is left over is spent step by step.
    """
    low, high = 0.0, 1e-30
    while _bytes(_at(choices, high)) > budget and high < 1e30:
        high *= 10
    for _ in range(100):
        price = (low * high) ** 0.5 if low else high / 10
        low, high = (low, price) if _bytes(_at(choices, price)) <= budget else (price, high)
        if low and high / low < 1 + 1e-9:
            break
    return _filled(choices, _at(choices, high), budget)


def _at(choices: Mapping[str, Sequence[Choice]], price: float) -> dict[str, Choice]:
    """The best of each where a byte costs `price`."""
    return {name: min(own, key=lambda c: (c.harm + price * c.nbytes, c.nbytes)) for name, own in choices.items()}


def _bytes(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.nbytes for choice in chosen.values())


def _filled(choices: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], budget: int) -> dict[str, Choice]:
    """Changes of one parameter that still fit and lessen the harm, the greatest gain a byte first."""
    while True:
        room = budget - _bytes(chosen)
        better = [
            ((chosen[name].harm - c.harm) / max(c.nbytes - chosen[name].nbytes, 1), name, c)
            for name, own in choices.items()
            for c in own
            if c.harm < chosen[name].harm and c.nbytes - chosen[name].nbytes <= room
        ]
        if not better:
            return chosen
        _, name, choice = max(better, key=lambda item: item[0])
        chosen = {**chosen, name: choice}
