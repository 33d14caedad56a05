"""The threshold of whole answers by Learn-then-Test: every prompt is answered once by each model."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from effc import certificate
from effc.calibration.learn_then_test import Certificate, certify
from effc.curves import summary
from effc.ir.core import Module
from effc.passes.base import Notes
from effc.passes.cascade.calibrate import by_hand
from effc.passes.cascade.small import with_decode
from effc.passes.cascade.texts import Prompts, certified_line, promise
from effc.passes.cascade.ways import ANSWER, Curve, drawn
from effc.passes.draft import plan
from effc.runtime.engine import Engine

if TYPE_CHECKING:
    from effc.passes.cascade.answer import Cascade
    from effc.passes.context import Context
    from effc.weights import Store

GRID = tuple(round(0.99 - 0.01 * i, 2) for i in range(100))
"""Thresholds in the order they are tested: fixed before any text is seen. Each costs a sum, so they may be fine."""


@dataclass(frozen=True)
class Answered:
    """Of every prompt the small model's confidence, and what its answer loses."""

    sure: list[float]
    lost: list[float]

    def losses(self, threshold: float) -> list[float]:
        """Of each prompt; nothing where the large model answers."""
        return [lost if sure >= threshold else 0.0 for sure, lost in zip(self.sure, self.lost, strict=True)]

    def deferral(self, threshold: float) -> float:
        """Share of prompts that the large model answers."""
        return sum(sure < threshold for sure in self.sure) / max(1, len(self.sure))


def by_threshold(made_by: Cascade, module: Module, store: Store, context: Context, notes: Notes) -> Module:
    """The module with a certified threshold; 1, the large model always, where nothing is or it would be slower."""
    if not made_by.automatic and not made_by.curve:
        return module
    started, engine = time.perf_counter(), plan.served(module, store)
    if not made_by.automatic:
        return by_hand(made_by, module, engine, context, notes)
    engine.eos = tuple(context.tokenizer.eos_ids) if context.tokenizer else ()
    prompts = Prompts.of(made_by, context)
    answered = _answered(engine, module, prompts) if prompts.rows else Answered([], [])
    found = certify(answered.losses, len(prompts.rows), delta=made_by.delta, epsilon=made_by.epsilon, grid=GRID)
    chosen = 1.0 if found.chosen is None else found.chosen
    speeds: dict[str, float] = {}
    if found.chosen is None:
        notes.chose(f"the large model answers: {found.reason()}")
    else:
        notes.chose(certified_line(found, "threshold") + f", {answered.deferral(chosen):.0%} deferred")
        speeds = _speeds(engine, module, prompts, answered.deferral(chosen))
        chosen = _worth(made_by, chosen, speeds, notes)
    curve = drawn(made_by, module, engine, prompts, None if found.chosen is None else (ANSWER, found.chosen))
    notes.measured = _numbers(made_by, found, answered, speeds, curve, notes, started)
    told = promise(made_by, found, chosen) if chosen < 1 else {}
    settled = with_decode(module, "cascade", threshold=chosen, **told)
    return certificate.bind(settled, store) if told else settled


def _answered(engine: Engine, module: Module, prompts: Prompts) -> Answered:
    """Both models' answers to every prompt, as `generate` gives them."""
    both = plan.decoding(engine, module)
    first, full = (prompts.generate(both, exits=threshold) for threshold in (0.0, 1.0))
    sure = [one for result in first if result.stats.answers for one in result.stats.answers.confidences]
    said, whole = ([tokens for result in results for tokens in result.tokens] for results in (first, full))
    return Answered(sure, prompts.losses(said, whole))


def _at(engine: Engine, module: Module, threshold: float) -> Engine:
    found = plan.decoding(engine, module)
    assert found.answers is not None
    found.answers = replace(found.answers, asked=threshold)
    return found


def _speeds(engine: Engine, module: Module, prompts: Prompts, deferral: float) -> dict[str, float]:
    """Over the large model's: of the small one reading its answer again, and of both by how much is deferred."""
    ways = {"large": _at(engine, module, 1.0), "small": _at(engine, module, 0.0)}
    small = prompts.race(ways)["small"]
    return {"large": 1.0, "small": small, "cascade": 1 / (1 / small + deferral)}


def _worth(made_by: Cascade, chosen: float, speeds: dict[str, float], notes: Notes) -> float:
    """The threshold, or 1 where the cascade would be slower."""
    shown = f"x{speeds['cascade']:.2f} tokens/s of the large model, the small one alone x{speeds['small']:.2f}"
    if speeds["cascade"] > 1 or made_by.force:
        notes.chose(f"threshold {chosen:g}: {shown}")
        return chosen
    notes.chose(f"the large model answers: the cascade is slower, {shown} (force=true cascades all the same)")
    return 1.0


def _numbers(
    made_by: Cascade,
    found: Certificate,
    answered: Answered,
    speeds: dict[str, float],
    curve: Curve,
    notes: Notes,
    started: float,
) -> dict[str, Any]:
    """For report.json."""
    tried = [
        {"threshold": t.setting, "loss": t.mean, "p": t.p, "certified": t.passed,
         "deferral": answered.deferral(t.setting)}
        for t in found.tried
    ]  # fmt: skip
    return {
        "kind": "cascade", "confidence": made_by.confidence, "certified": found.chosen, "delta": found.delta,
        "epsilon": found.epsilon, "n": found.n, "needed": found.needed, "reason": found.reason(), "tried": tried,
        "speeds": speeds, "curve": curve, "summary": [*notes.choices, *summary(curve)],
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


__all__ = ["Answered", "by_threshold"]
