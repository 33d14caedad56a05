"""Training a drafter: the target reads text once, then the drafter learns what the target would say next."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.certificate import fingerprint
from effc.ir.core import Module
from effc.passes.draft import coming, taught
from effc.passes.draft.asking import LONGEST, prompts
from effc.passes.draft.head import VERIFY
from effc.passes.draft.lesson import Lesson, drop, keep, kept, learned
from effc.passes.draft.parts import PREFIX
from effc.passes.draft.scribe import Scribe, scribe
from effc.runtime.train.budget import Budget
from effc.runtime.train.loop import Evaluate
from effc.runtime.train.losses import mean
from effc.runtime.train.plan import Batch, Plan, Tick, Tree
from effc.runtime.train.tree import chosen, put, take
from effc.weights import Store

if TYPE_CHECKING:
    from effc.passes.context import Context, Model

ROWS, LENGTH = 8, 128
"""Sequences of a step and their tokens: few, since there is little time; so many that Muon takes little of it."""

ROWS_READ, WHOLE = 16, 2 * LONGEST
"""Texts read or written at a time, and the tokens of a prompt with its answer."""

RATE, RATE_HEAD = 1e-3, 5e-4
"""Learning rates: of AdamW, and of Muon, which learns more of a head from the same text."""

HELD = 32
"""Texts of a longer lesson that are looked at while it is learned, and not learned from."""

STEPS = 2
"""How far a head follows its own features while it is trained."""

LATER = 0.6
"""Weight of each further step."""

READING = 0.6
"""Share of a budget of time that the target may spend on reading: what is read once more teaches little that is new."""

LEAST = 64
"""Sequences read whatever the budget; twice as many batches as steps where that counts steps."""


@dataclass(frozen=True)
class Source:
    """What is read: answers to prompts, a line of the file each, or the training text; features where a head reads."""

    features: bool
    prompts: Path | None = None


def read(made_by: str, module: Module, store: Store, context: Context, source: Source) -> Lesson:
    """What the target makes of the training text, as much as the budget allows; on disk for when this is resumed.

    A larger budget, or more prompts at the end of their file, reads on from where the last run stopped.
    """
    asked = prompts(context, source.prompts) if source.prompts else []
    folder = context.folder / f"lesson-{_key(module, store, context, source.features, asked[:ROWS_READ])}"
    spent = folder / "seconds"
    before = len(list(kept(folder)))
    there = answered(folder, asked) if source.prompts else before
    # What is dropped of a lesson took its share of the time.
    seconds = float(spent.read_text()) * there / before if there and spent.exists() else 0.0
    if not there or _reads_on(context.budget, there * ROWS_READ, seconds):
        reader = scribe(made_by, module, store, context, source.features)
        for number, chunk in enumerate(islice(_chunks(reader, context, asked), there, None), there):
            start = time.perf_counter()
            keep(folder, number, chunk())
            seconds += time.perf_counter() - start
            spent.write_text(str(seconds))
            if not _reads_on(context.budget, (number + 1) * ROWS_READ, seconds):
                break
    return Lesson(list(kept(folder)), seconds, folder)


def answered(folder: Path, asked: Sequence[list[int]]) -> int:
    """How many chunks there are answers to these prompts, from the first on; what comes after is dropped."""
    for number, chunk in enumerate(kept(folder)):
        mine = asked[number * ROWS_READ : (number + 1) * ROWS_READ]
        said = [row[:start].tolist() for row, (start, _) in zip(chunk["tokens"], chunk["spans"], strict=True)]
        if said != mine:
            drop(folder, number)
            return number
    return len(list(kept(folder)))


def _key(module: Module, store: Store, context: Context, features: bool, first: Sequence[list[int]]) -> str:
    """Of what reads and what is read (the text, or what is asked first): another target is another lesson."""
    funcs = {name: func for name, func in module.funcs.items() if name not in (PREFIX, VERIFY)}
    params = {name: param for name, param in module.params.items() if not name.startswith(f"{PREFIX}.")}
    target = fingerprint(replace(module, funcs=funcs, params=params, decode=None, meta={}), store)
    told = repr(first) if first else context.calib or ""
    return hashlib.sha256(f"{told}{target} {features} {context.seed}".encode()).hexdigest()[:12]


def _chunks(
    reader: Scribe, context: Context, asked: Sequence[list[int]]
) -> Iterator[Callable[[], Mapping[str, np.ndarray]]]:
    """What makes each chunk: answers to the prompts where there are some, all once; else windows of the text."""
    if asked:
        for number, at in enumerate(range(0, len(asked), ROWS_READ)):
            yield partial(reader.answers, asked[at : at + ROWS_READ], WHOLE, context.seed * 100_003 + number)
        return
    batches = context.batches(ROWS_READ, LENGTH)
    most = None if context.ids is None else max(1, len(context.ids) // (LENGTH * ROWS_READ))
    for number in count() if most is None else range(most):
        yield lambda number=number: reader.reads(np.asarray(batches(number, None)["tokens"], np.int32))


def _reads_on(budget: Budget, rows: int, seconds: float) -> bool:
    if budget.steps:
        return rows < min(ROWS * budget.steps, 2 * LEAST)
    return rows < LEAST or seconds < READING * 60 * budget.minutes


def frequent(lesson: Lesson, count: int, vocab: int) -> np.ndarray:
    """i32[count]: tokens the target would say most often, in order; those never said by number."""
    return np.sort(np.argsort(-lesson.said(vocab), kind="stable")[:count]).astype(np.int32)


def fit(model: Model, lesson: Lesson, ids: np.ndarray | None, context: Context, lr: float = 0.0) -> Tree:
    """The parameters with the drafter's trained; those of the target stay. lr=0 is the usual one.

    What is to be coded learns rounded as it will be. A drafter that learned from a lesson in the same folder before,
    a shorter one or to be coded another way, learns on from there.
    """
    draft, places = model.program.entries["draft"], _places(ids)
    held = HELD if lesson.texts >= 10 * HELD else 0

    def loss(params: Tree, batch: Batch, tick: Tick | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = coming.rounded(how, model.program, params)
        steps = _headed(draft, params, batch) if lesson.features else [(draft(params, batch["tokens"])[0], 0)]
        parts = [_step(logits, batch, shift) for logits, shift in steps]
        total = sum(LATER**i * part for i, (part, _) in enumerate(parts))
        agree = {f"agree{i}": agree for i, (_, agree) in enumerate(parts, 1)}
        return jnp.asarray(total), {**agree, "count": batch["mask"].sum().astype(jnp.float32)}

    budget = _left(context.budget, lesson.seconds)
    plan = Plan(budget, warmup=20, seed=context.seed, weight_decay=0.01, b2=0.98, **_optimizer(lesson.features, lr))
    mask = _learns(model)
    tag = _tag(lesson, model, context)
    before, params = known(model, lesson, context), model.params
    if before is not None:
        context.tell(f"draft: learns on from what {before[0]} of {lesson.texts} texts taught")
        params = put(params, {name: jnp.asarray(array) for name, array in before[1].items()}, mask)
    batches = _batches(lesson, places, lesson.texts - held, context.seed, before[0] if before else 0)
    how = coming.roundings(model, params, context.later)
    rest = [range(at, at + ROWS) for at in range(lesson.texts - held, lesson.texts, ROWS)]
    look = _looks(lambda params, batch: loss(params, batch, None)[1], [_batch(lesson, places, n) for n in rest])
    told = {"evaluate": look if held else None, "tag": tag, "title": "draft"}
    fitted = context.fit(loss, params, batches, plan, trainable=mask, **told).params
    taught.keep(lesson, {name: np.asarray(array) for name, array in take(fitted, mask).items()}, tag)
    # On their codes, so that what codes them finds these again.
    mine = {name: rounding for name, rounding in how.items() if not name.startswith("draft.head.")}
    return coming.rounded(mine, model.program, fitted)


def known(model: Model, lesson: Lesson, context: Context) -> tuple[int, dict[str, np.ndarray]] | None:
    """What a drafter like this one learned from such a lesson before, and from how many texts: training begins so."""
    return taught.latest(lesson, take(model.params, _learns(model)), _tag(lesson, model, context))


def _learns(model: Model) -> dict[str, bool]:
    """A mask of the drafter's own. Its rows of the target's head are good as they are, and half of a step's cost."""
    mask = {**chosen(model.program.params, "draft.*")}
    return mask | {name: False for name in mask if name == "draft.ids" or name.startswith("draft.head.")}


def _tag(lesson: Lesson, model: Model, context: Context) -> str:
    """What tells a run from others: what it learns from, and how its weights will be coded."""
    coded = coming.quants(model.module, context.later)
    return f"{lesson.texts} {lesson.tokens} {sorted((name, str(quant)) for name, quant in coded.items())}"


def _optimizer(head: bool, lr: float) -> dict[str, Any]:
    """Of `Plan`: the optimizer and its rate."""
    return {"optimizer": "muon" if head else "adamw", "lr": lr or (RATE_HEAD if head else RATE)}


def _looks(measure: Callable[[Tree, Batch], Mapping[str, jax.Array]], batches: Sequence[Batch]) -> Evaluate:
    """For `fit`: how often drafts are right, first and second, on texts that are not learned from."""
    measured = jax.jit(measure)

    def call(params: Tree) -> dict[str, float]:
        found = [{name: float(x) for name, x in measured(params, batch).items()} for batch in batches]
        total = sum(one["count"] for one in found)
        return {n: sum(one[n] * one["count"] for one in found) / total for n in found[0] if n != "count"}

    return call


def _headed(draft: Callable[..., Any], params: Tree, batch: Batch) -> list[tuple[jax.Array, int]]:
    """Logits of each step: token i+1 with the features of token i, then with what the step before made of them."""
    tokens, features, out = batch["tokens"], batch["features"].astype(jnp.float32), list[tuple[jax.Array, int]]()
    for step in range(STEPS):
        logits, features, _ = draft(params, tokens[:, step + 1 :], features[:, :-1])
        out.append((logits, step + 1))
    return out


def _step(logits: jax.Array, batch: Batch, shift: int) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy to the target's likeliest tokens, logits[:, i] against what it says at i + shift; agreement."""
    places, top, mask = (batch[name][:, shift:] for name in ("places", "top", "mask"))
    n = min(places.shape[1], logits.shape[1])
    places, top, mask, logits = places[:, :n], top[:, :n], mask[:, :n], logits[:, :n].astype(jnp.float32)
    there, most = places >= 0, logits.shape[-1]
    weights = jnp.where(there, jax.nn.softmax(top.astype(jnp.float32), axis=-1), 0)
    wanted = jnp.take_along_axis(logits, jnp.clip(places, 0, most - 1), axis=-1)
    told = wanted - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    agree = jnp.argmax(logits, axis=-1) == places[..., 0]
    return mean(-(weights * told).sum(-1), mask), mean(agree.astype(jnp.float32), mask)


def _places(ids: np.ndarray | None) -> np.ndarray | None:
    """The drafter's number of each of the target's tokens, -1 where it has none."""
    if ids is None:
        return None
    out = np.full(int(ids.max()) + 2, -1, np.int32)
    out[ids] = np.arange(len(ids))
    return out


def _batches(
    lesson: Lesson, places: np.ndarray | None, count: int, seed: int, known: int = 0
) -> Callable[[int, Tree], dict[str, Any]]:
    """The first `count` texts, in a new order each time all were seen; the first `known` were learned from before."""

    def call(step: int, params: Tree) -> dict[str, Any]:
        turns = [divmod(i, count) for i in range(step * ROWS, (step + 1) * ROWS)]
        numbers = [int(_order(seed, turn, count, 0 if turn else known)[i]) for turn, i in turns]
        return _batch(lesson, places, numbers)

    return call


def _batch(lesson: Lesson, places: np.ndarray | None, numbers: Sequence[int]) -> dict[str, Any]:
    found = lesson.rows(numbers)
    ids = found["ids"]
    # The last of `places` stands for every token beyond the drafter's.
    known = ids if places is None else places[np.minimum(ids, len(places) - 1)]
    batch = {"tokens": found["tokens"], "top": found["logits"], "places": known}
    batch["mask"] = learned(found["spans"], found["tokens"].shape[1])
    return batch | ({"features": found["features"]} if lesson.features else {})


@lru_cache(maxsize=2)
def _order(seed: int, turn: int, count: int, known: int) -> np.ndarray:
    """By chance; but of texts that are new and known ones in turn, until one kind has ended: time may end first."""
    order = np.random.default_rng((seed, turn)).permutation(count)
    old = order < known
    # The n-th of its kind comes at 2n, or after it.
    place = 2 * np.where(old, np.cumsum(old), np.cumsum(~old)) + old
    return order[np.argsort(place, kind="stable")] if known else order


def _left(budget: Budget, seconds: float) -> Budget:
    """What reading left of it."""
    if budget.steps:
        return budget
    return replace(budget, minutes=max(budget.minutes - seconds / 60, 0.05 * budget.minutes))
