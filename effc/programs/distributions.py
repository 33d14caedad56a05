"""What a site draws from: small distributions of plain Python values, and the two steps every distribution has.

A distribution is a pair of generators that yield lists of model calls and are sent their answers, so that whoever
runs many of them may answer the calls of all in one batch. Those of this file ask no model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from effc.errors import EffcError
from effc.programs import keys
from effc.programs.calls import Call, answered
from effc.programs.keys import Key


@dataclass(frozen=True)
class Draw:
    """A value, its log-probability, and the log-probability with which it was proposed (the same unless tempered).

    tokens: those read and made by models; forwards: calls of a model's forward function that it takes alone.
    """

    value: Any
    score: float
    proposal: float
    tokens: int = 0
    forwards: int = 0


Steps = Generator[list[Call], list[Any], Draw]


class Failed(Exception):
    """Raised while drawing where there is no value: the trace is rejected."""


class Distribution(ABC):
    """`sample(seed)` and `log_prob(value)` answer at once; programs use the generators below them."""

    @abstractmethod
    def drawing(self, key: Key) -> Steps:
        """A value drawn with that key."""

    @abstractmethod
    def scoring(self, value: Any) -> Steps:
        """That value with its log-probability."""

    def sample(self, seed: int | jax.Array = 0) -> Draw:
        """One value; a number or a JAX key decides which."""
        return answered(self.drawing(keys.root(seed)))

    def log_prob(self, value: Any) -> float:
        """-inf for what cannot be drawn."""
        return answered(self.scoring(value)).score


class Plain(Distribution):
    """Of values that need no model."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Any:
        """A value."""

    @abstractmethod
    def logp(self, value: Any) -> float:
        """Its log-probability."""

    def drawing(self, key: Key) -> Steps:
        yield from ()
        value = self.draw(keys.rng(key))
        score = self.logp(value)
        return Draw(value, score, score)

    def scoring(self, value: Any) -> Steps:
        yield from ()
        return Draw(value, self.logp(value), 0.0)


@dataclass(frozen=True)
class Bernoulli(Plain):
    """True with probability p."""

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise EffcError(f"Bernoulli: p is {self.p}, want 0 to 1")

    def draw(self, rng: np.random.Generator) -> bool:
        return bool(rng.random() < self.p)

    def logp(self, value: Any) -> float:
        return _log(self.p if value else 1 - self.p)


@dataclass(frozen=True)
class Categorical(Plain):
    """One of the values, with probabilities as these weights are to each other: {value: weight}."""

    weights: Mapping[Any, float]

    def __post_init__(self) -> None:
        numbers = list(self.weights.values())
        if not numbers or not all(math.isfinite(w) and w >= 0 for w in numbers) or not sum(numbers):
            raise EffcError(f"Categorical: weights {numbers}, want numbers of 0 or more, not all of them 0")

    def draw(self, rng: np.random.Generator) -> Any:
        numbers = np.asarray(list(self.weights.values()), float)
        return list(self.weights)[int(rng.choice(len(numbers), p=numbers / numbers.sum()))]

    def logp(self, value: Any) -> float:
        return _log(self.weights.get(value, 0.0) / sum(self.weights.values()))


def uniform(values: Sequence[Any]) -> Categorical:
    """Each as likely as the others; one that is there twice is twice as likely."""
    weights: dict[Any, float] = {}
    for value in values:
        weights[value] = weights.get(value, 0.0) + 1.0
    return Categorical(weights)


@dataclass(frozen=True)
class Choose(Plain):
    """k different ones of the options, in the order drawn: each in turn by weight among those left (Gumbel top-k)."""

    options: Sequence[Any]
    k: int
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        numbers = self.weights if self.weights is not None else [1.0] * len(self.options)
        possible = sum(w > 0 for w in numbers)
        if len(numbers) != len(self.options) or not all(math.isfinite(w) and w >= 0 for w in numbers):
            raise EffcError(f"Choose: weights {list(numbers)}, want {len(self.options)} numbers of 0 or more")
        twice = [one for i, one in enumerate(self.options) if one in list(self.options)[:i]]
        if twice:
            raise EffcError(f"Choose: option {twice[0]!r} is there twice, want options that differ")
        if not 0 <= self.k <= possible:
            raise EffcError(f"Choose: k is {self.k}, want 0 to {possible}, the options that can be drawn")

    def _numbers(self) -> np.ndarray:
        return np.asarray(self.weights if self.weights is not None else np.ones(len(self.options)), float)

    def draw(self, rng: np.random.Generator) -> tuple[Any, ...]:
        with np.errstate(divide="ignore"):
            noisy = np.log(self._numbers()) + rng.gumbel(size=len(self.options))
        return tuple(self.options[i] for i in np.argsort(-noisy)[: self.k])

    def logp(self, value: Any) -> float:
        left, numbers = list(self.options), list(self._numbers())
        if len(value) != self.k or any(one not in left for one in value):
            return -math.inf
        total = 0.0
        for one in value:
            if one not in left:
                return -math.inf
            i = left.index(one)
            total += _log(numbers[i] / sum(numbers))
            del left[i], numbers[i]
        return total


@dataclass(frozen=True)
class Constant(Plain):
    """One value, always."""

    value: Any

    def draw(self, rng: np.random.Generator) -> Any:
        return self.value

    def logp(self, value: Any) -> float:
        return 0.0 if value == self.value else -math.inf


@dataclass(frozen=True)
class Tool(Plain):
    """What a deterministic function gives for these arguments; `rejects` are exceptions that reject the trace."""

    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    rejects: tuple[type[Exception], ...] = ()

    def draw(self, rng: np.random.Generator) -> Any:
        try:
            return self.call(*self.args)
        except self.rejects as error:
            name = getattr(self.call, "__name__", "tool")
            raise Failed(f"{name}: {type(error).__name__}: {error}") from None

    def drawing(self, key: Key) -> Steps:
        yield from ()
        return Draw(self.draw(keys.rng(key)), 0.0, 0.0)

    def logp(self, value: Any) -> float:
        return 0.0 if self.draw(keys.rng((0, 0))) == value else -math.inf


def tool(call: Callable[..., Any], *args: Any, rejects: tuple[type[Exception], ...] = ()) -> Tool:
    """A node of a program that runs `call(*args)`: a calculator, a parser, a search."""
    return Tool(call, args, rejects)


@dataclass(frozen=True)
class Memo(Distribution):
    """Drawn once a trace: every later site with an equal one gets the same value, at no score."""

    dist: Distribution

    def drawing(self, key: Key) -> Steps:
        return self.dist.drawing(key)

    def scoring(self, value: Any) -> Steps:
        return self.dist.scoring(value)


@dataclass(frozen=True)
class Proposed(Distribution):
    """Drawn from one distribution and scored by another: a small model proposes, a large one weighs."""

    target: Distribution
    by: Distribution = field(kw_only=True)

    def drawing(self, key: Key) -> Steps:
        drawn = yield from self.by.drawing(key)
        scored = yield from self.target.scoring(drawn.value)
        tokens, forwards = drawn.tokens + scored.tokens, drawn.forwards + scored.forwards
        return Draw(drawn.value, scored.score, drawn.proposal, tokens, forwards)

    def scoring(self, value: Any) -> Steps:
        return self.target.scoring(value)


def _log(p: float) -> float:
    return math.log(p) if p > 0 else -math.inf
