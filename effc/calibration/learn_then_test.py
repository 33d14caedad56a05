"""Learn-then-Test: the boldest setting of a fixed sequence whose loss is certified, tested from the safest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from effc.calibration.p_values import PValue, hoeffding_bentkus, needed
from effc.errors import EffcError

GRID = tuple(round(1 - 0.05 * i, 2) for i in range(21))
"""1.0, 0.95, ... 0.0: fixed before any loss is seen, else the guarantee is void."""


@dataclass(frozen=True)
class Tried:
    """One setting: mean loss of the n prompts, p-value, and whether it was certified."""

    setting: float
    mean: float
    p: float
    passed: bool


@dataclass(frozen=True)
class Certificate:
    """With probability 1 - epsilon over the calibration prompts, the mean loss at `chosen` is at most delta.

    `chosen` is None where nothing was certified: the full model then. `needed` prompts is the least that could
    certify anything.
    """

    chosen: float | None
    delta: float
    epsilon: float
    n: int
    needed: int
    tried: tuple[Tried, ...] = field(default=())

    @property
    def loss(self) -> float:
        """Mean loss measured at `chosen`; 0 where that is the full model."""
        return next((t.mean for t in self.tried if t.setting == self.chosen), 0.0)

    def reason(self, setting: str = "threshold") -> str:
        """Why nothing was certified; empty where something was. setting: what is tried, in a word."""
        if self.chosen is not None:
            return ""
        if self.n < self.needed:
            return f"{self.n} calibration prompts, want {self.needed} at least for delta {self.delta:g}"
        first = self.tried[0]
        return (
            f"already at {setting} {first.setting:g} the mean loss of {self.n} prompts is {first.mean:.3f}, "
            f"too near delta {self.delta:g} or above it"
        )


def certify(
    losses: Callable[[float], Sequence[float]], n: int, *, delta: float, epsilon: float,
    grid: Sequence[float] = GRID, p_value: PValue = hoeffding_bentkus,
) -> Certificate:  # fmt: skip
    """Settings of `grid` in order until the first that fails; `losses(setting)` gives n numbers in [0,1].

    With fewer than `needed` prompts no loss is asked for: nothing could be certified.
    """
    _check(delta, epsilon)
    least = needed(delta, epsilon, p_value)
    chosen, tried = None, list[Tried]()
    for setting in grid if n >= least else ():
        mean = _mean(losses(setting), n)
        p = p_value(mean, n, delta)
        tried.append(Tried(setting, mean, p, p <= epsilon))
        if p > epsilon:
            break
        chosen = setting
    return Certificate(chosen, delta, epsilon, n, least, tuple(tried))


def _check(delta: float, epsilon: float) -> None:
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0 < value < 1:
            raise EffcError(f"calibration: {name} is {value:g}, want more than 0 and less than 1")


def _mean(losses: Sequence[float], n: int) -> float:
    if len(losses) != n or not all(0 <= loss <= 1 for loss in losses):
        raise EffcError(f"calibration: {len(losses)} losses between {min(losses)} and {max(losses)}, want {n} in [0,1]")
    return sum(losses) / n
