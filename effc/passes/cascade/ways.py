"""Ways to decode with the two models of a cascade, each judged and timed on the same prompts: a cost-quality curve."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from effc.calibration.consistency import LIKENESS
from effc.ir.core import Module, Ref
from effc.ir.decoding import CASCADE, CERTIFIED
from effc.passes.cascade.small import GAMMA, Cascading
from effc.passes.cascade.texts import Prompts, counts
from effc.passes.draft.plan import Costs, measure
from effc.runtime.chain import BOUNDS
from effc.runtime.deferral import GRIDS
from effc.runtime.engine import Engine
from effc.runtime.generate import Result, generate

TOKEN, ANSWER = "token", "answer"
"""Plain cascades: the small model speaks while it is sure of each token, or for whole answers."""

ALONE = 16
"""Tokens that the small model says before the large one reads them, in a plain cascade by token."""

RULES = tuple(GRIDS)

EACH = 3
"""Settings of each rule in the report of a pass, beside the one that runs."""

TIMED, ROUNDS = 2, 2
"""Prompts that are timed there, and how often."""

EAGER = (0.999,) * (len(BOUNDS) + 1)
"""Chances with which every draft is sent in full: to see how often each level is right."""

NONE = {"rule", "alpha", "acceptance", *CASCADE, *CERTIFIED}
"""What plain speculation has no use for, or is measured for it anew."""


Curve = dict[str, Any]
"""prompts: how many; rows as effc.curves reads them. Empty where none is drawn."""


@dataclass
class Way:
    """A way to decode: engine, alpha or threshold of it; what it came to."""

    name: str
    setting: float | None
    engine: Engine
    how: dict[str, float] = field(default_factory=dict[str, float])
    mark: str = ""
    loss: float = 0.0
    score: float | None = None
    told: dict[str, float] = field(default_factory=dict[str, float])
    rates: list[float] = field(default_factory=list[float])
    speed: float = 0.0

    def json(self) -> dict[str, Any]:
        """A row as effc.curves reads it."""
        rate = statistics.median(self.rates) if self.rates else None
        return {
            "way": self.name, "setting": self.setting, "mark": self.mark, "loss": self.loss, "score": self.score,
            **self.told, "rate": rate, "speed": self.speed,
        }  # fmt: skip


@dataclass(frozen=True)
class Ways:
    """Of one pair of models. base: plain speculation. whole: whether the small model can speak without the large."""

    base: Engine
    confidence: str = "mean"
    whole: bool = True
    made: dict[tuple[str, int], Engine] = field(default_factory=dict[tuple[str, int], Engine], compare=False)

    @staticmethod
    def of(
        engine: Engine, prompts: Prompts, gamma: int = 0, known: Costs | None = None, confidence: str = "mean"
    ) -> Ways:
        """Of an engine with a small model; costs are measured where they are not known, acceptance anew."""
        decode: dict[str, Any] = {k: v for k, v in engine.program.decode.items() if k not in NONE}
        gamma = gamma or int(decode.get("gamma") or GAMMA)
        decode |= {"strategy": "speculative", "gamma": gamma}
        costs = known or measure(_decoding(engine, decode), gamma)
        decode |= {"curve": costs.curve, "cost": costs.draft}
        eager = _decoding(engine, decode | {"acceptance": EAGER})
        levels = generate(eager, prompts.rows[:8], max_new_tokens=prompts.asked.tokens, stop_ids=()).stats.levels
        whole = decode.get("kind") != "head" and "vocab" not in decode
        return Ways(_decoding(engine, decode | {"acceptance": levels}), confidence, whole)

    def engine(self, **decode: Any) -> Engine:
        """Decoding so."""
        return _decoding(self.base, {**self.base.program.decode, **decode})

    def answering(self) -> Engine:
        """A cascade by whole answers."""
        return self.engine(strategy="cascade", level="sequence", threshold=0.5, confidence=self.confidence)

    def deferring(self, name: str, gamma: int = 0) -> Engine:
        """A rule, or for TOKEN the small model alone until Chow's rule defers; made and compiled once."""
        alone = {"strategy": "cascade", "level": "token"} if name == TOKEN else {}
        gamma = gamma or (ALONE if name == TOKEN else int(self.base.program.decode["gamma"]))
        if (name, gamma) not in self.made:
            rule = "chow" if name == TOKEN else name
            self.made[name, gamma] = self.engine(rule=rule, alpha=0.5, gamma=gamma, **alone)
        return self.made[name, gamma]

    def plain(self) -> list[Way]:
        """Each model alone, and plain speculation."""
        large = Way("large", None, _decoding(self.base, {}))
        small = [Way("small", None, self.answering().small)] if self.whole else []
        return [large, *small, Way("speculation", None, self.base)]

    def rule(self, name: str, each: int, chosen: float | None, mark: str) -> list[Way]:
        """Some alphas of a rule, the chosen one among them."""
        engine, grid = self.deferring(name), GRIDS["chow" if name == TOKEN else name]
        picked = {grid[int(i)] for i in np.linspace(0, len(grid) - 1, each)} | ({chosen} - {None})
        return [
            Way(name, alpha, engine, {"alpha": alpha}, mark if alpha == chosen else "")
            for alpha in sorted(a for a in picked if a is not None)
        ]

    def answers(self, prompts: Prompts, each: int, chosen: float | None, mark: str) -> list[Way]:
        """Thresholds of whole answers, from those that defer none of these prompts to those that defer all but one."""
        engine = self.answering()
        sure = [
            one for r in prompts.generate(engine, exits=0.0) if r.stats.answers for one in r.stats.answers.confidences
        ]
        spread = {math.floor(1000 * float(x)) / 1000 for x in np.quantile(sure, np.linspace(0, 1, each))}
        picked = spread | ({chosen} if chosen is not None else set[float]())
        return [
            Way(ANSWER, one, engine, {"exits": one}, mark if one == chosen else "")
            for one in sorted(picked, reverse=True)
        ]


def _decoding(engine: Engine, decode: Mapping[str, Any]) -> Engine:
    return Engine(replace(engine.program, decode=dict(decode)), engine.params, engine.eos)


def tokens_of(results: Sequence[Result]) -> list[list[int]]:
    """Of all rows."""
    return [tokens for result in results for tokens in result.tokens]


def judge(way: Way, prompts: Prompts, full: Sequence[list[int]], references: Sequence[list[int]] | None = None) -> None:
    """Loss against the texts `full`, likeness to references where there are any, and what drafts or answers came to."""
    results = prompts.generate(way.engine, **way.how)
    said, likeness = tokens_of(results), LIKENESS[prompts.asked.loss]
    way.loss = statistics.mean(prompts.losses(said, full))
    if references is not None:
        way.score = statistics.mean(likeness(one, other) for one, other in zip(said, references, strict=True))
    drafts = [r.stats.draft for r in results if r.stats.draft]
    answers = [r.stats.answers for r in results if r.stats.answers]
    if drafts:
        way.told = counts(drafts)
        if drafts[0].deferral is None:
            del way.told["deferral"]
    elif answers:
        late = [one for told in answers for one in told.deferred]
        way.told = {"deferral": sum(late) / len(late)}
        large, small = (sum(getattr(told, n) for told in answers) for n in ("large_calls", "small_calls"))
        # Past the prompt, as of drafts.
        way.told |= {"large_calls": large - sum(late), "small_calls": small - len(late)}
    else:
        calls = sum(len(row) - 1 for row in said)
        large, small = (0, calls) if way.name == "small" else (calls, 0)
        way.told = {"large_calls": large, "small_calls": small}


def race(ways: Sequence[Way], prompts: Sequence[list[int]], tokens: int, rounds: int) -> None:
    """Tokens a second of each, in turn; speed over plain speculation's at the same prompt of the same round."""
    for number in range(rounds + 1):
        for prompt in prompts:
            for way in ways:
                told = generate(way.engine, [prompt], max_new_tokens=tokens, stop_ids=(), **way.how)  # type: ignore[arg-type]
                if number:  # the first compiles
                    way.rates.append(told.stats.decode_rate)
    plain = next(way for way in ways if way.name == "speculation")
    for way in ways:
        way.speed = statistics.median(b / a for a, b in zip(plain.rates, way.rates, strict=True))


def drawn(
    made_by: Cascading, module: Module, engine: Engine, prompts: Prompts, chosen: tuple[str, float] | None
) -> Curve:
    """Rows of every rule beside plain speculation and each model alone, on a few of the prompts, one at a time."""
    assert module.decode is not None
    few = prompts.first(made_by.curve)
    if not few.rows:
        return {}
    attrs = {name: value.name if isinstance(value, Ref) else value for name, value in module.decode.attrs.items()}
    confidence = str(attrs.get("confidence", "mean"))
    ways = Ways.of(_decoding(engine, attrs), few, made_by.gamma, known(attrs), confidence)
    mark = "certified" if made_by.automatic else "by hand"
    settings = {chosen[0]: chosen[1]} if chosen else {}
    found = ways.plain()
    for name in (*RULES, TOKEN) if ways.whole else RULES:
        found += ways.rule(name, EACH, settings.get(name), mark)
    if ways.whole:
        found += ways.answers(few, EACH, settings.get(ANSWER), mark)
    full = tokens_of(few.generate(found[0].engine))
    for way in found:
        judge(way, few, full)
    race(found, few.rows[:TIMED], made_by.tokens, ROUNDS)
    return {"prompts": len(few.rows), "rows": [way.json() for way in found]}


def running(module: Module) -> tuple[str, float]:
    """The way that a cascade's `decode` says, and its setting."""
    assert module.decode is not None
    attrs = module.decode.attrs
    if attrs.get("level") == "sequence":
        return ANSWER, float(str(attrs["threshold"]))
    return TOKEN if "level" in attrs else str(attrs["rule"]), float(str(attrs["alpha"]))


def known(attrs: Mapping[str, Any]) -> Costs | None:
    """What was measured of this module already."""
    return Costs(tuple(attrs["curve"]), float(attrs["cost"]), 0.0) if "cost" in attrs and "curve" in attrs else None


__all__ = ["ANSWER", "TOKEN", "Curve", "Way", "Ways", "drawn", "judge", "race", "running", "tokens_of"]
