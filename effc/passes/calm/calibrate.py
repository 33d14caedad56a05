"""The threshold of exits, by Learn-then-Test on texts generated at every threshold against the full model's."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from effc import certificate
from effc.calibration.consistency import LIKENESS, risk, textual
from effc.calibration.learn_then_test import Certificate, certify
from effc.ir.core import Decode, Module, Op
from effc.ir.rewrite import replace_ops
from effc.passes.base import Notes
from effc.passes.calm.side import TOGETHER, agreement, together
from effc.passes.calm.texts import part
from effc.passes.calm.train import early_name
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.leaving import Left
from effc.weights import Store

if TYPE_CHECKING:
    from effc.passes.calm.calm import Calm
    from effc.passes.context import Context

GRID = (0.998, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 0.75, 0.7, 0.65,
        0.6, 0.55, 0.5, 0.45, 0.4, 0.37, 0.34, 0.31, 0.28, 0.26, 0.24, 0.22, 0.2, 0.18, 0.16, 0.14, 0.12, 0.1, 0.08,
        0.06, 0.04, 0.02, 0.0)  # fmt: skip
"""Thresholds in the order they are tested, finest where exits are good enough: fixed before any text is seen."""

BATCH = 16
"""Prompts generated together: native products take so many rows, and give each what it gets alone, to the bit."""

TIMED, ROUNDS = 8, 4
"""Prompts that are timed one by one at every certified threshold, and how often, in turn."""


@dataclass
class Texts:
    """Prompts, what the full model says after each, and what is measured at each threshold."""

    engine: Engine
    prompts: Sequence[list[int]]
    references: Sequence[list[int]] | None
    asked: Calm
    left: dict[float, Left] = field(default_factory=dict[float, Left])
    rates: dict[float, float] = field(default_factory=dict[float, float])
    gains: dict[float, float] = field(default_factory=dict[float, float])

    @cached_property
    def full(self) -> list[list[int]]:
        """What the full model says after each prompt."""
        return self.say(1.0)

    def say(self, threshold: float) -> list[list[int]]:
        """What follows each prompt; how many layers that took is noted."""
        together = 1 if self.asked.rows == "wait" else BATCH  # rows that wait depend on each other
        out, counts = list[list[int]](), dict[int, int]()
        for start in range(0, len(self.prompts), together):
            result = generate(
                self.engine, self.prompts[start : start + together], max_new_tokens=self.asked.tokens, exits=threshold
            )
            out += result.tokens
            for layers, count in (result.stats.exits.by_layers if result.stats.exits else {}).items():
                counts[layers] = counts.get(layers, 0) + count
        self.left[threshold] = Left(counts)
        return out

    def losses(self, threshold: float) -> list[float]:
        """Of each prompt, against the full model's text or, for risk, against the reference."""
        likeness, early = LIKENESS[self.asked.loss], self.say(threshold)
        if self.references is None:
            return [textual(e, f, likeness) for e, f in zip(early, self.full, strict=True)]
        return [risk(e, f, r, likeness) for e, f, r in zip(early, self.full, self.references, strict=True)]

    def time(self, thresholds: Sequence[float]) -> None:
        """Tokens a second of one sequence at each threshold, and over the full model's at the same prompt.

        Medians of rounds in which all take turns, prompt by prompt: other work on the machine slows both alike.
        """
        found: dict[float, list[float]] = {threshold: [] for threshold in (1.0, *thresholds)}
        for threshold in found:
            self._rate(threshold, 0)  # compiles
        for at in [*range(min(TIMED, len(self.prompts)))] * ROUNDS:
            for threshold, rates in found.items():
                rates.append(self._rate(threshold, at))
        self.rates = {threshold: median(rates) for threshold, rates in found.items()}
        pairs = {t: [one / full for one, full in zip(rates, found[1.0], strict=True)] for t, rates in found.items()}
        self.gains = {threshold: median(ratios) for threshold, ratios in pairs.items()}

    def _rate(self, threshold: float, at: int) -> float:
        new = self.asked.tokens
        stats = generate(self.engine, [self.prompts[at]], max_new_tokens=new, exits=threshold, stop_ids=()).stats
        return stats.decode_rate


def calibrate(made_by: Calm, module: Module, store: Store, context: Context, notes: Notes) -> Module:
    """The module with the fastest of the thresholds that are certified, if it is no slower than the full model."""
    started = time.perf_counter()
    model = context.model(module, store)
    texts = _texts(made_by, Engine(model.program, model.params, _ends(context)), context)
    found = certify(
        texts.losses, len(texts.prompts), delta=made_by.delta, epsilon=made_by.epsilon, grid=GRID
    )  # fmt: skip
    passed = [t.setting for t in found.tried if t.passed]
    if passed:
        texts.time([*_some(passed), *(t.setting for t in found.tried if not t.passed)])
    chosen = max((t for t in passed if t in texts.gains), key=texts.gains.__getitem__, default=1.0)
    chosen = chosen if texts.gains.get(chosen, 0.0) >= 1 else 1.0
    agreed = agreement(module, store, context, texts.prompts, texts.full) if texts.prompts else {}
    if agreed:
        shares = ", ".join(f"{share:.1%} after {place}" for place, share in agreed.items())
        notes.chose(f"exits agree with the last layer on {shares} layers, on its own texts")
    _tell(notes, found, texts, chosen)
    gains = _together(made_by, module, store, context, texts, chosen)
    alone = gains.get(made_by.rows, 1.0) < 1
    if gains:
        ways = ", ".join(f"x{gain:.2f} {_WAYS[rows]}" for rows, gain in gains.items())
        rest = ": more than one text at a time run all layers" if alone else ""
        notes.chose(f"of {TOGETHER} texts at once: {ways}, tokens/s over the full model's{rest}")
    told = {"summary": list(notes.choices), "seconds": time.perf_counter() - started}
    told["chart"] = chart(
        texts.rates, {t.setting: t.mean for t in found.tried}, {t.setting for t in found.tried if t.passed}
    )
    for line in told["chart"]:
        notes.chose(line)
    told |= {"agreement": agreed, "together": {"texts": TOGETHER, **gains} if gains else {}}
    notes.measured = {**_numbers(found, texts, chosen), **told}
    return certificate.bind(_settled(module, made_by, found, chosen, alone), store)


_WAYS = {"masked": "each leaving by itself", "wait": "waiting for the least sure"}


def _together(
    made_by: Calm, module: Module, store: Store, context: Context, texts: Texts, chosen: float
) -> dict[str, float]:
    """By way of leaving in a batch; nothing where the full model runs."""
    if chosen == 1 or len(texts.prompts) < TOGETHER:
        return {}
    return together(module, store, context, texts.prompts, made_by.tokens, chosen)


def _ends(context: Context) -> tuple[int, ...]:
    return tuple(context.tokenizer.eos_ids) if context.tokenizer else ()


def _texts(made_by: Calm, engine: Engine, context: Context) -> Texts:
    """Prompts from the part of --calib that exits have not learnt from, else samples that they have not seen."""
    rest = replace(context, calib=part(context.calib, learnt=False), seed=context.seed + 1)
    length = made_by.prompt + (made_by.tokens if made_by.risk else 0)
    room = len(rest.ids) // (length - len(rest.head)) if rest.ids is not None else made_by.prompts
    rows = rest.prompts(min(made_by.prompts, room), length).tolist() if room else []
    references = [row[made_by.prompt :] for row in rows] if made_by.risk else None
    return Texts(engine, [row[: made_by.prompt] for row in rows], references, made_by)


def _some(thresholds: Sequence[float], most: int = 6) -> list[float]:
    """The last, and some before it evenly: timing every one takes long."""
    if len(thresholds) <= most:
        return list(thresholds)
    return [thresholds[int(i)] for i in np.linspace(0, len(thresholds) - 1, most)]


def _settled(module: Module, made_by: Calm, found: Certificate, chosen: float, alone: bool) -> Module:
    """The threshold in the op and in `decode`, beside what is promised of it; alone: for one text at a time."""
    name = early_name(module)

    def settle(op: Op) -> list[Op] | None:
        return [replace(op, attrs={**op.attrs, "threshold": chosen})] if op.kind == "early" else None

    loss = next((t.mean for t in found.tried if t.setting == chosen), 0.0)
    told = {
        "threshold": chosen, "tokens": made_by.tokens, "delta": made_by.delta, "epsilon": made_by.epsilon,
        "loss": round(loss, 6), "n": found.n, "measure": "risk" if made_by.risk else "textual", "of": made_by.loss,
    }  # fmt: skip
    told |= {"most": 1} if alone else {}
    assert module.decode is not None
    decode = Decode(module.decode.strategy, {**module.decode.attrs, **told})
    return replace(module.with_func(replace_ops(module.funcs[name], settle)), decode=decode)


# -- what is said -------------------------------------------------------------------------------------------


def _numbers(found: Certificate, texts: Texts, chosen: float) -> dict[str, Any]:
    """For report.json."""
    tried = [{"threshold": 1.0, "loss": 0.0, "p": None, "certified": True}]
    tried += [{"threshold": t.setting, "loss": t.mean, "p": t.p, "certified": t.passed} for t in found.tried]
    for row in tried:
        left = texts.left.get(float(str(row["threshold"])))
        rate = texts.rates.get(float(str(row["threshold"])))
        row |= {"layers": left.average if left and left.tokens else None, "tokens_per_second": rate}
        row["speed"] = texts.gains.get(float(str(row["threshold"])))
    left = texts.left.get(chosen)
    return {
        "kind": "exits", "threshold": chosen, "certified": found.chosen, "delta": found.delta,
        "epsilon": found.epsilon, "n": found.n, "needed": found.needed, "reason": found.reason(),
        "tokens_by_layers": dict(left.by_layers) if left else {}, "thresholds": tried,
    }  # fmt: skip


def _tell(notes: Notes, found: Certificate, texts: Texts, chosen: float) -> None:
    if found.chosen is None:
        notes.chose(f"the full model runs: {found.reason()}")
        return
    last = next(t for t in found.tried if t.setting == found.chosen)
    notes.chose(
        f"certified from threshold {found.chosen:g} up: mean loss {last.mean:.4f} of {found.n} prompts, at most "
        f"{found.delta:g} with probability {1 - found.epsilon:g} (p = {last.p:.3g})"
    )
    if chosen == 1:
        best = max(texts.gains.get(t.setting, 0.0) for t in found.tried if t.passed)
        notes.chose(f"the full model runs: exits are slower, x{best:.2f} tokens/s at best")
    else:
        left, speed = texts.left[chosen], texts.gains[chosen]
        notes.chose(f"threshold {chosen:g}: x{speed:.2f} tokens/s, {left.average:.2f} layers a token, {_shares(left)}")


def _shares(left: Left) -> str:
    return ", ".join(f"{count / left.tokens:.0%} after {n}" for n, count in left.by_layers.items())


def chart(
    rates: Mapping[float, float], losses: Mapping[float, float], certified: Collection[float], width: int = 30
) -> list[str]:
    """A bar a threshold: tokens a second, the loss beside it, and whether that is certified."""
    most = max(rates.values(), default=0.0) or 1.0
    return [
        f"{threshold:<5g} {'█' * max(1, round(width * rate / most)):<{width}} {rate:7.1f} tokens/s, "
        f"loss {losses.get(threshold, 0.0):.4f}{'' if threshold == 1 or threshold in certified else ', not certified'}"
        for threshold, rate in rates.items()
    ]
