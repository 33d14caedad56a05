"""Training a drafter: the target reads text once, then the drafter learns what the target would say next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effc.runtime.train.budget import Budget
from effc.runtime.train.plan import Batch, Plan, Tick, Tree
from effc.runtime.train.tree import chosen

if TYPE_CHECKING:
    from effc.passes.context import Context, Model

TOP = 16
"""Likeliest tokens of the target that are learned from."""

ROWS, LENGTH = 4, 128
"""Sequences of a step and their tokens: small steps, since there is little time."""

STEPS = 2
"""How far a head follows its own features while it is trained."""

LATER = 0.6
"""Weight of each further step."""

READING = 0.4
"""Share of a budget of time that the target may spend on reading."""

LEAST = 64
"""Sequences read whatever the budget; twice as many batches as steps where that counts steps."""


@dataclass(frozen=True)
class Lesson:
    """tokens i32[n,t]; features f16[n,t,d] of a head; top ids i32 and logits f32 [n,t,TOP]; seconds it took."""

    tokens: np.ndarray
    features: np.ndarray | None
    ids: np.ndarray
    logits: np.ndarray
    seconds: float


def read(model: Model, context: Context, features: bool) -> Lesson:
    """What the target makes of the training text, as much as the budget allows."""
    verify = model.program.entries["verify"] if features else model.program.extend

    @jax.jit
    def see(params: Tree, tokens: jax.Array) -> tuple[Any, ...]:
        logits, *others, _ = verify(params, tokens)
        top, ids = lax.top_k(logits, min(TOP, logits.shape[-1]))
        return ids, top, *(x.astype(jnp.float16) for x in others)

    start, batches, seen = time.perf_counter(), context.batches(ROWS, LENGTH), list[tuple[np.ndarray, ...]]()
    most = None if context.ids is None else max(1, len(context.ids) // LENGTH)
    while _reads_on(context.budget, len(seen) * ROWS, time.perf_counter() - start, most):
        tokens = np.asarray(batches(len(seen), None)["tokens"], np.int32)
        seen.append((tokens, *map(np.asarray, see(model.params, tokens))))
    tokens, ids, top, *others = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    return Lesson(tokens, others[0] if others else None, ids, top, time.perf_counter() - start)


def _reads_on(budget: Budget, rows: int, seconds: float, most: int | None) -> bool:
    if most is not None and rows >= most:
        return False
    if budget.steps:
        return rows < min(ROWS * budget.steps, 2 * LEAST)
    return rows < LEAST or seconds < READING * 60 * budget.minutes


def frequent(lesson: Lesson, count: int, vocab: int) -> np.ndarray:
    """i32[count]: tokens the target would say most often, in order; those never said by number."""
    weights = np.exp(lesson.logits - lesson.logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    said = np.bincount(lesson.ids.ravel(), weights.ravel(), vocab)
    return np.sort(np.argsort(-said, kind="stable")[:count]).astype(np.int32)


def fit(model: Model, lesson: Lesson, ids: np.ndarray | None, context: Context) -> Tree:
    """The parameters with the drafter's trained; those of the target stay."""
    draft, head = model.program.entries["draft"], lesson.features is not None
    places = _places(ids, int(lesson.ids.max()) + 1)
    batches = _batches(lesson, places, context.seed)

    def loss(params: Tree, batch: Batch, tick: Tick) -> tuple[jax.Array, dict[str, jax.Array]]:
        steps = _headed(draft, params, batch) if head else [(draft(params, batch["tokens"])[0], 0)]
        parts = [_step(logits, batch, shift) for logits, shift in steps]
        total = jnp.stack([LATER**i * part for i, (part, _) in enumerate(parts)]).sum()
        return total, {"agree": parts[0][1], "count": jnp.float32(batch["tokens"].size)}

    budget = _left(context.budget, lesson.seconds)
    plan = Plan(budget, lr=1e-3, warmup=20, seed=context.seed, weight_decay=0.01)
    mask = {**chosen(model.program.params, "draft.*")}
    # Its rows of the target's head are good as they are, and half of what a step would cost.
    mask |= {name: False for name in mask if name == "draft.ids" or name.startswith("draft.head.")}
    tag = f"{lesson.tokens.shape}"
    fitted = context.fit(loss, model.params, batches, plan, trainable=mask, tag=tag, title="draft")
    return fitted.params


def _headed(draft: Callable[..., Any], params: Tree, batch: Batch) -> list[tuple[jax.Array, int]]:
    """Logits of each step: token i+1 with the features of token i, then with what the step before made of them."""
    tokens, features, out = batch["tokens"], batch["features"].astype(jnp.float32), list[tuple[jax.Array, int]]()
    for step in range(STEPS):
        logits, features, _ = draft(params, tokens[:, step + 1 :], features[:, :-1])
        out.append((logits, step + 1))
    return out


def _step(logits: jax.Array, batch: Batch, shift: int) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy to the target's likeliest tokens, logits[:, i] against what it says at i + shift; agreement."""
    places, top = batch["places"][:, shift:], batch["top"][:, shift:]
    n = min(places.shape[1], logits.shape[1])
    places, top, logits = places[:, :n], top[:, :n], logits[:, :n].astype(jnp.float32)
    there = places >= 0
    weights = jnp.where(there, jax.nn.softmax(top, axis=-1), 0)
    told = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(places, 0), axis=-1)
    agree = jnp.argmax(logits, axis=-1) == places[..., 0]
    return -(weights * told).sum(-1).mean(), agree.mean()


def _places(ids: np.ndarray | None, most: int) -> np.ndarray | None:
    """The drafter's number of each of the target's tokens, -1 where it has none."""
    if ids is None:
        return None
    out = np.full(max(most, int(ids.max()) + 1), -1, np.int32)
    out[ids] = np.arange(len(ids))
    return out


def _batches(lesson: Lesson, places: np.ndarray | None, seed: int) -> Callable[[int, Tree], dict[str, Any]]:
    """Sequences in a new order each time all were seen."""
    count = len(lesson.tokens)

    def call(step: int, params: Tree) -> dict[str, Any]:
        rows = [_order(seed, i // count, count)[i % count] for i in range(step * ROWS, (step + 1) * ROWS)]
        ids = lesson.ids[rows]
        batch = {
            "tokens": lesson.tokens[rows], "top": lesson.logits[rows],
            "places": ids if places is None else places[ids],
        }  # fmt: skip
        return batch | ({"features": lesson.features[rows]} if lesson.features is not None else {})

    return call


def _order(seed: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, turn)).permutation(count)


def _left(budget: Budget, seconds: float) -> Budget:
    """What reading left of it."""
    if budget.steps:
        return budget
    return replace(budget, minutes=max(budget.minutes - seconds / 60, 0.05 * budget.minutes))
