"""What a program may yield: samples, observations, factors, rejections, parameters and notes (algorithms 6.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from effc.errors import EffcError
from effc.programs.distributions import Distribution


class Missing:
    """Stands where nothing was observed; None is a value like any other."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing()


@dataclass(frozen=True)
class Sample:
    """A draw; with `obs` its value is given and its log-probability weighs the trace."""

    dist: Distribution
    name: str | None = None
    obs: Any = MISSING


@dataclass(frozen=True)
class Factor:
    """log weight added to the trace."""

    score: float
    name: str | None = None


@dataclass(frozen=True)
class Reject:
    """Ends the trace with weight 0."""

    reason: str = ""
    name: str | None = None


@dataclass(frozen=True)
class Param:
    """A value the caller may set; init is one, or a function without arguments that makes one."""

    name: str
    init: Any | Callable[[], Any] = MISSING


@dataclass(frozen=True)
class Log:
    """A note in the trace."""

    value: Any
    name: str | None = None


Effect = Sample | Factor | Reject | Param | Log


def sample(dist: Distribution, name: str | None = None, obs: Any = MISSING) -> Sample:
    """`x = yield sample(dist, "x")`; with obs the value is given, as by `observe`."""
    return Sample(dist, name, obs)


def observe(dist: Distribution, value: Any, name: str | None = None) -> Sample:
    """`yield observe(dist, value, "y")`: weighs the trace by the value's log-probability."""
    return Sample(dist, name, value)


def factor(score: float, name: str | None = None) -> Factor:
    """`yield factor(-1.5)`: weighs the trace by a log weight."""
    if math.isnan(score):
        raise EffcError(f"factor{f' {name}' if name else ''}: the score is nan, want a log weight")
    return Factor(float(score) + 0.0, name)  # no negative zero


def reject(reason: str = "", name: str | None = None) -> Reject:
    """`yield reject("no answer")`: nothing after it runs."""
    return Reject(reason, name)


def param(name: str, init: Any = MISSING) -> Param:
    """`k = yield param("k", 3)`: the caller's value, else init."""
    return Param(name, init)


def log(value: Any, name: str | None = None) -> Log:
    """`yield log(value)`."""
    return Log(value, name)
