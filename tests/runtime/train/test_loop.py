"""fit(): learns, resumes to the bit, accumulates as one batch, stops cleanly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from effc.runtime.train import Batch, Budget, Metrics, Plan, Row, Tick, Tree, cross_entropy, fit, mean, windows

IDS = np.tile(np.arange(8), 40).astype(np.int32)
BATCHES = windows(IDS, length=12, rows=8, seed=3)
PLAN = Plan(Budget(steps=8), lr=0.03, warmup=2)


def params(seed: int = 0) -> Tree:
    one, two = jax.random.split(jax.random.key(seed))
    return {"embed": jax.random.normal(one, (8, 16)) * 0.3, "head": [jax.random.normal(two, (16, 8)) * 0.3]}


def loss(tree: Tree, batch: Batch, tick: Tick) -> tuple[jax.Array, Metrics]:
    noise = 1 + 0.01 * jax.random.normal(tick.key, (16,)) * (1 - tick.progress)
    x = tree["embed"][batch["tokens"][:, :-1]] * noise[None, None]
    told = cross_entropy(x @ tree["head"][0], batch["tokens"][:, 1:])
    return mean(told, batch["mask"]), {"count": batch["mask"].sum()}


def equal(one: Tree, two: Tree) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def test_it_learns() -> None:
    start = params()
    fitted = fit(loss, start, BATCHES, replace(PLAN, budget=Budget(steps=40)))
    assert fitted.history[-1].loss < 0.5 * fitted.history[0].loss
    assert fitted.steps == 40
    assert fitted.tokens == 40 * 8 * 13
    assert equal(start, params())  # what was given is not used up


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path: Path) -> None:
    whole = fit(loss, params(), BATCHES, PLAN)

    def stop(row: Row) -> None:
        if row.step == 5:
            import signal

            signal.raise_signal(signal.SIGINT)

    kept = replace(PLAN, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(loss, params(), BATCHES, kept, watch=stop)
    resumed = fit(loss, params(), BATCHES, kept)
    assert resumed.resumed == 5
    assert equal(resumed.params, whole.params)
    assert [row.loss for row in resumed.history] == [row.loss for row in whole.history]
    again = fit(loss, params(), BATCHES, kept)
    assert again.resumed == 8 and equal(again.params, whole.params)
    other = fit(loss, params(1), BATCHES, kept)
    assert other.resumed == 0  # other arrays, another run
