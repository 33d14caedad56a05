"""Language models as distributions over text: drawn by decoding, scored teacher-forced (algorithms 6.3-1).

The value of a site is a text; the event behind it is the tokens drawn, those that spelled the stop string included,
and the end of sequence where that ended it. Its score is the log-probability of these under the untempered model;
the proposal is that of drawing them with this temperature and these filters, which importance weights need.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effc.errors import EffcError
from effc.generator import Generator, engine_of
from effc.opened import Opened, open_model
from effc.programs import keys
from effc.programs.calls import Cache, Decode, Drawing, Model, Scored, Scoring
from effc.programs.distributions import Distribution, Draw, Steps
from effc.programs.keys import Key
from effc.programs.model import EngineModel
from effc.programs.spelling import found
from effc.runtime.sampling import Sampling


class Text(str):
    """A text as it was drawn: a str that remembers its tokens, so that scoring it again scores these.

    finish: stop, end (of sequence) or length; logp: under the untempered model; origin: of which tokenizer and stops.
    """

    ids: tuple[int, ...] = ()
    finish: str = "length"
    logp: float = math.nan
    origin: Hashable = None

    @staticmethod
    def of(value: str, ids: tuple[int, ...], finish: str, logp: float, origin: Hashable) -> Text:
        """With what it remembers."""
        text = Text(value)
        text.ids, text.finish, text.logp, text.origin = ids, finish, logp, origin
        return text

    @property
    def confidence(self) -> float:
        """Mean probability (geometric) of its tokens, the end's counted: what a cascade defers by."""
        count = len(self.ids) + (self.finish == "end")
        return math.exp(self.logp / count) if count else 1.0


class LM:
    """`lm = LM("out")`; `lm(prompt, stop="\\n")` is a distribution over what follows.

    model: an artifact, a checkpoint, or an open Generator. rows: of every device call (8; 1 where the program has a
    drafter). cache: to share answers with other LMs; by default it has its own.
    """

    def __init__(self, model: str | Path | Generator | Model, *, rows: int | None = None, cache: Cache | None = None):
        if rows is not None and rows < 1:
            raise EffcError(f"LM: rows is {rows}, want at least 1")
        if isinstance(model, Model) and (rows is not None or cache is not None):
            raise EffcError("LM: rows or cache for a model that has its own, want one or the other")
        self.model = model if isinstance(model, Model) else _engine_model(model, rows, cache)

    def __call__(
        self, prompt: str, *, stop: str | Sequence[str] = (), max_tokens: int = 64, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, include_until: bool = False,
        ended: bool | None = None,
    ) -> Completion:  # fmt: skip
        """What follows the prompt, up to a stop string, the end of sequence or max_tokens; temperature 0 is greedy.

        include_until: the stop string is part of the value. ended: whether a plain text that is scored ends there: at
        its first stop string (None: where there are any), at the end of sequence where there are none.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise EffcError("LM: a stop string is empty, want text")
        if max_tokens < 1:
            raise EffcError(f"LM: max_tokens is {max_tokens}, want at least 1")
        how = Decode(max_tokens, Sampling(temperature, top_k, top_p, min_p), stops)
        return Completion(self, prompt, how, include_until, bool(stops) if ended is None else ended)

    def choice(self, prompt: str, options: Sequence[str]) -> Choice:
        """One of these texts, each as likely as the model finds it after the prompt, among them."""
        if not options or len(set(options)) != len(options) or "" in options:
            raise EffcError(f"LM: options {list(options)}, want texts that differ, none empty")
        return Choice(self, prompt, tuple(options))

    @property
    def usage(self) -> dict[str, int]:
        """What its device calls came to so far."""
        return self.model.usage.json()


@dataclass(frozen=True)
class Completion(Distribution):
    """Texts that follow a prompt."""

    lm: LM
    prompt: str
    how: Decode
    include_until: bool = False
    ended: bool = False

    def drawing(self, key: Key) -> Steps:
        prompt = self._ids(self.how.max_tokens)
        # A greedy draw needs no key: without one equal calls are one.
        call = Drawing(self.lm.model, prompt, self.how, (0, 0) if self.how.sampling.greedy else key)
        drawn = (yield [call])[0]
        end = drawn.finish == "end"
        scored = (yield from self._score(prompt, drawn.ids, end)) if drawn.ids or end else _NOTHING
        value = Text.of(self._shown(drawn.text), drawn.ids, drawn.finish, sum(scored.tokens), self._origin())
        tokens = 2 * (len(prompt) + len(drawn.ids) + end)  # read and drawn, and read again to be scored
        return Draw(value, sum(scored.tokens), scored.proposal, tokens, drawn.forwards + scored.forwards)

    def scoring(self, value: Any) -> Steps:
        if not isinstance(value, str):
            raise EffcError(f"LM: observed {value!r}, want text")
        if not self._possible(value):
            return Draw(value, -math.inf, 0.0)
        prompt = self._ids(1)
        ids, end = self._event(prompt, value)
        scored = (yield from self._score(prompt, ids, end)) if ids or end else _NOTHING
        return Draw(value, sum(scored.tokens), scored.proposal, len(prompt) + len(ids) + end, scored.forwards)

    def _score(self, prompt: tuple[int, ...], ids: tuple[int, ...], end: bool) -> Any:
        self.lm.model.check(prompt, len(ids) + end)
        return (yield [Scoring(self.lm.model, prompt, ids, end, self.how.sampling)])[0]

    def _ids(self, new: int) -> tuple[int, ...]:
        prompt = self.lm.model.encode(self.prompt)
        self.lm.model.check(prompt, new)
        return prompt

    def _origin(self) -> Hashable:
        return self.lm.model.speller, self.how.stop, self.include_until

    def _shown(self, text: str) -> str:
        """Up to the stop string, or to its end."""
        place = found(text, self.how.stop)
        return text if place is None else text[: place[self.include_until]]

    def _possible(self, value: str) -> bool:
        """Whether a text could be the value: a stop string is nowhere but, if that is included, at its end."""
        place = found(value, self.how.stop)
        if self.include_until:
            return place is None or place[1] == len(value)
        return place is None

    def _event(self, prompt: tuple[int, ...], value: str) -> tuple[tuple[int, ...], bool]:
        """The ids that are scored, and whether the end of sequence is too."""
        if isinstance(value, Text) and value.origin == self._origin():
            return value.ids, value.finish == "end"
        ends = self.ended and not (self.include_until and found(value, self.how.stop))
        spelled = value + self.how.stop[0] if ends and self.how.stop else value
        ids = self.lm.model.spell(self.prompt, prompt, spelled) if spelled else ()
        return ids, ends and not self.how.stop


@dataclass(frozen=True)
class Choice(Distribution):
    """One of a few texts. Its probabilities are the model's of each text, divided by their sum."""

    lm: LM
    prompt: str
    options: tuple[str, ...]

    def drawing(self, key: Key) -> Steps:
        logp, tokens, forwards = yield from self._all()
        i = int(keys.rng(key).choice(len(logp), p=np.exp(logp)))
        return Draw(self.options[i], float(logp[i]), float(logp[i]), tokens, forwards)

    def scoring(self, value: Any) -> Steps:
        if value not in self.options:
            return Draw(value, -math.inf, 0.0)
        logp, tokens, forwards = yield from self._all()
        return Draw(value, float(logp[self.options.index(value)]), 0.0, tokens, forwards)

    def _all(self) -> Any:
        """Log-probabilities of the options, the tokens read and the forwards it took."""
        model = self.lm.model
        prompt = model.encode(self.prompt)
        each = [model.spell(self.prompt, prompt, option) for option in self.options]
        for ids in each:
            model.check(prompt, len(ids))
        found: list[Scored] = yield [Scoring(model, prompt, ids, False, Sampling(1.0)) for ids in each]
        totals = np.asarray([sum(one.tokens) for one in found])
        tokens = sum(len(prompt) + len(ids) for ids in each)
        return totals - np.logaddexp.reduce(totals), tokens, sum(one.forwards for one in found)


_NOTHING = Scored((), 0.0, 0)


def _engine_model(model: str | Path | Generator, rows: int | None, cache: Cache | None) -> EngineModel:
    if isinstance(model, Generator):
        return EngineModel(model, None, rows, cache)
    opened: Opened = open_model(Path(model))
    tokenizer = opened.tokenizer()
    return EngineModel(Generator(engine_of(opened, tokenizer.eos_ids), tokenizer), opened, rows, cache)
