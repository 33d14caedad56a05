"""Model calls as values: what is asked of a model, what it answers, and the cache between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from effc.programs.keys import Key
from effc.runtime.sampling import Sampling

T = TypeVar("T")


@dataclass(frozen=True)
class Decode:
    """How a text is drawn: decode settings, the same for all rows of a device call."""

    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """Tokens after a prompt."""

    model: Model
    prompt: tuple[int, ...]
    how: Decode
    key: Key


@dataclass(frozen=True)
class Drawn:
    """ids as drawn, to the token that completes a stop string; finish: stop, end (of sequence) or length."""

    ids: tuple[int, ...]
    finish: str
    text: str
    forwards: int


@dataclass(frozen=True)
class Scoring:
    """Log-probabilities of ids after a prompt, and of the end of sequence after them where `ended`."""

    model: Model
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    ended: bool
    sampling: Sampling


@dataclass(frozen=True)
class Scored:
    """tokens: log-probabilities under the untempered model, the end's last; proposal: of all as they are sampled."""

    tokens: tuple[float, ...]
    proposal: float
    forwards: int


Call = Drawing | Scoring
Answer = Drawn | Scored


@dataclass
class Usage:
    """What a model's device calls came to. rows: those that were asked; padded: rows that only fill a batch."""

    calls: int = 0
    rows: int = 0
    padded: int = 0
    hits: int = 0

    def json(self) -> dict[str, int]:
        """Counts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Model(ABC):
    """What answers calls: an engine with its tokenizer, or a table in tests. Equal only to itself."""

    usage: Usage
    speller: Hashable
    """The tokenizer's identity: token ids mean the same to models that share it."""

    @abstractmethod
    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt; EffcError where there are none."""

    @abstractmethod
    def spell(self, prompt: str, ids: Sequence[int], value: str) -> tuple[int, ...]:
        """Token ids of `value` after a prompt of those ids."""

    @abstractmethod
    def check(self, prompt: Sequence[int], new: int) -> None:
        """EffcError where so many tokens do not fit."""

    @abstractmethod
    def answer(self, calls: Sequence[Call]) -> list[Answer]:
        """Of each call; an answer does not depend on the other calls."""


class Cache:
    """Answers by model and call, the latest `limit` of them."""

    def __init__(self, limit: int = 65536):
        self.limit = limit
        self._kept: OrderedDict[Hashable, Answer] = OrderedDict()

    def get(self, key: Hashable) -> Answer | None:
        """The answer kept, which counts as used now."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, answer: Answer) -> None:
        """Keeps it, and drops the one used longest ago beyond the limit."""
        self._kept[key] = answer
        self._kept.move_to_end(key)
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)

    def __len__(self) -> int:
        return len(self._kept)


def answer_all(calls: Sequence[Call]) -> list[Answer]:
    """Of calls to any models, each model asked once."""
    answers: dict[int, Answer] = {}
    for model in dict.fromkeys(call.model for call in calls):
        mine = [i for i, call in enumerate(calls) if call.model is model]
        answers |= zip(mine, model.answer([calls[i] for i in mine]), strict=True)
    return [answers[i] for i in range(len(calls))]


def answered(steps: Generator[list[Call], list[Any], T]) -> T:
    """What a generator of calls comes to, run alone."""
    answers: list[Any] | None = None
    while True:
        try:
            calls = next(steps) if answers is None else steps.send(answers)
        except StopIteration as stop:
            return stop.value
        answers = answer_all(calls)
