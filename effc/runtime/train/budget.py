"""How much training: so many steps, or so many minutes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from effc.errors import EffcError

_UNITS = {"s": 1 / 60, "m": 1.0, "h": 60.0}


@dataclass(frozen=True)
class Budget:
    """One of the two counts, the other is 0; both 0 is no training. Runs of `steps` can be repeated to the bit."""

    steps: int = 0
    minutes: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.minutes < 0 or (self.steps and self.minutes):
            raise EffcError(f"budget: {self.steps} steps and {self.minutes:g} minutes, want one of them, not below 0")

    @staticmethod
    def parse(text: str) -> Budget:
        """`500` or `500 steps`, `10m`, `90s` or `1.5h`."""
        found = re.fullmatch(r"(\d+)(?: steps)?|(\d*\.?\d+)([smh])", text.strip())
        if not found:
            raise EffcError(f"budget '{text}': want steps (500) or a time (90s, 10m, 1.5h)")
        if found[1]:
            return Budget(steps=int(found[1]))
        return Budget(minutes=float(found[2]) * _UNITS[found[3]])

    def __str__(self) -> str:
        if self.steps:
            return str(self.steps)
        return f"{self.minutes:g}m" if self.minutes >= 1 or not self.minutes else f"{self.minutes * 60:g}s"

    def __bool__(self) -> bool:
        return bool(self.steps or self.minutes)

    def share(self, part: float) -> Budget:
        """This part of it, 0 to 1; at least a step of what has steps."""
        if self.steps:
            return Budget(steps=max(1, round(self.steps * part)) if part else 0)
        return Budget(minutes=self.minutes * part)

    def spent(self, steps: int, seconds: float) -> float:
        """Progress from 0 to 1 after so many steps and seconds."""
        if self.steps:
            return min(1.0, steps / self.steps)
        return min(1.0, seconds / (60 * self.minutes)) if self.minutes else 1.0
