"""Texts of a cascade on calibration prompts, and what each loses against the large model's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from effc.calibration.consistency import LIKENESS, risk, textual
from effc.calibration.learn_then_test import Certificate
from effc.passes.cascade.small import part
from effc.runtime.engine import Engine
from effc.runtime.generate import Drafted, Result, generate

if TYPE_CHECKING:
    from effc.passes.cascade.small import Cascading
    from effc.passes.context import Context

BATCH = 50
"""Prompts generated together."""

TIMED, ROUNDS = 4, 3
"""Prompts that are timed one by one, and how often, in turn."""


@dataclass(frozen=True)
class Prompts:
    """What is calibrated on: prompts, and what follows them in --calib where the loss is a risk."""

    rows: Sequence[list[int]]
    references: Sequence[list[int]] | None
    asked: Cascading
    batch: int = BATCH

    @staticmethod
    def of(made_by: Cascading, context: Context) -> Prompts:
        """Of the part of --calib that no small model has learnt from, else samples that none has seen."""
        rest = replace(context, calib=part(made_by, context, learnt=False), seed=context.seed + 1)
        length = made_by.prompt + (made_by.tokens if made_by.risk else 0)
        room = len(rest.ids) // max(1, length - len(rest.head)) if rest.ids is not None else made_by.prompts
        rows = rest.prompts(min(made_by.prompts, room), length).tolist() if room else []
        references = [row[made_by.prompt :] for row in rows] if made_by.risk else None
        return Prompts([row[: made_by.prompt] for row in rows], references, made_by)

    def first(self, count: int) -> Prompts:
        """Some of them, to be answered one at a time."""
        references = self.references and self.references[:count]
        return replace(self, rows=self.rows[:count], references=references, batch=1)

    def generate(self, engine: Engine, **how: float) -> list[Result]:
        """What the engine says after each, at most `batch` at a time; batches of one size as far as it goes."""
        size = -(-len(self.rows) // -(-len(self.rows) // self.batch))
        batches = [self.rows[at : at + size] for at in range(0, len(self.rows), size)]
        return [generate(engine, rows, max_new_tokens=self.asked.tokens, **how) for rows in batches]  # type: ignore[arg-type]

    def losses(self, said: Sequence[list[int]], full: Sequence[list[int]]) -> list[float]:
        """In [0,1], of each text against the large model's or, for risk, how much worse than it."""
        likeness = LIKENESS[self.asked.loss]
        if self.references is None:
            return [textual(one, other, likeness) for one, other in zip(said, full, strict=True)]
        rows = zip(said, full, self.references, strict=True)
        return [risk(one, other, reference, likeness) for one, other, reference in rows]

    def race(self, engines: Mapping[str, Engine]) -> dict[str, float]:
        """Tokens a second of each over the first's: medians of rounds in which all take turns, prompt by prompt."""
        rates = {name: list[float]() for name in engines}
        for number in range(ROUNDS + 1):
            for prompt in self.rows[:TIMED]:
                for name, engine in engines.items():
                    told = generate(engine, [prompt], max_new_tokens=self.asked.tokens, stop_ids=()).stats
                    if number:  # the first compiles
                        rates[name].append(told.decode_rate)
        first = next(iter(rates.values()))
        return {n: statistics.median(b / a for a, b in zip(first, each, strict=True)) for n, each in rates.items()}


@dataclass
class Speaking:
    """Texts of a deferral rule at each alpha, by one engine; what drafts came to is noted."""

    engine: Engine
    prompts: Prompts
    told: dict[float, dict[str, float]] = field(default_factory=dict[float, dict[str, float]])

    @cached_property
    def full(self) -> list[list[int]]:
        """What the large model says: every rule at its lossless end."""
        return self.say(-float("inf"))

    def say(self, alpha: float) -> list[list[int]]:
        """Texts at this alpha; it is a number of the loop, so nothing is compiled anew."""
        results = self.prompts.generate(self.engine, alpha=alpha)
        self.told[alpha] = counts([r.stats.draft for r in results if r.stats.draft])
        return [tokens for result in results for tokens in result.tokens]

    def losses(self, alpha: float) -> list[float]:
        """Of each prompt."""
        return self.prompts.losses(self.say(alpha), self.full)


def counts(drafts: Sequence[Drafted]) -> dict[str, float]:
    """Shares and forwards of all of them together."""
    emitted, drafted = sum(d.emitted for d in drafts), sum(d.drafted for d in drafts)
    return {
        "deferral": sum((d.deferral or 0) * d.emitted for d in drafts) / max(1, emitted),
        "acceptance": sum(d.accepted for d in drafts) / max(1, drafted),
        "large_calls": sum(d.calls for d in drafts), "small_calls": sum(d.draft_calls for d in drafts),
        "emitted": emitted,
    }  # fmt: skip


def promise(made_by: Cascading, found: Certificate, setting: float) -> dict[str, Any]:
    """Attributes of `decode` that say what is certified of a setting."""
    loss = next((t.mean for t in found.tried if t.setting == setting), 0.0)
    return {
        "tokens": made_by.tokens, "delta": made_by.delta, "epsilon": made_by.epsilon, "loss": round(loss, 6),
        "n": found.n, "measure": "risk" if made_by.risk else "textual", "likeness": made_by.loss,
    }  # fmt: skip


def certified_line(found: Certificate, name: str) -> str:
    """For the report."""
    last = next(t for t in found.tried if t.setting == found.chosen)
    return (
        f"certified up to {name} {found.chosen:g}: mean loss {last.mean:.4f} of {found.n} prompts, at most "
        f"{found.delta:g} with probability {1 - found.epsilon:g} (p = {last.p:.3g})"
    )


__all__ = ["BATCH", "Prompts", "Speaking", "certified_line", "counts", "promise"]
