"""fit(): learns, resumes to the bit, accumulates as one batch, stops cleanly."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from effc.errors import EffcError
from effc.runtime.train import Batch, Budget, Metrics, Plan, Row, Tick, Tree, cross_entropy, fit, mean, windows
from effc.runtime.train.loop import Watch

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


def stop_at(step: int, number: int = signal.SIGINT) -> Watch:
    def watch(row: Row) -> None:
        if row.step == step:
            signal.raise_signal(number)

    return watch


def equal(one: Tree, two: Tree) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.03), ("muon", 0.1)])
def test_it_learns(optimizer: Literal["adamw", "muon"], lr: float) -> None:
    start = params()
    fitted = fit(loss, start, BATCHES, replace(PLAN, optimizer=optimizer, lr=lr, budget=Budget(steps=40)))
    assert fitted.history[-1].loss < 0.5 * fitted.history[0].loss
    assert fitted.steps == 40
    assert fitted.tokens == 40 * 8 * 13
    assert equal(start, params())  # what was given is not used up


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path: Path, optimizer: Literal["adamw", "muon"]) -> None:
    plan = replace(PLAN, optimizer=optimizer)
    whole = fit(loss, params(), BATCHES, plan)

    kept = replace(plan, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt, match=r"kept at step 5 in .*: the same command goes on"):
        fit(loss, params(), BATCHES, kept, watch=stop_at(5))
    resumed = fit(loss, params(), BATCHES, kept)
    assert resumed.resumed == 5
    assert equal(resumed.params, whole.params)
    assert [row.loss for row in resumed.history] == [row.loss for row in whole.history]
    again = fit(loss, params(), BATCHES, kept)
    assert again.resumed == 8 and equal(again.params, whole.params)
    other = fit(loss, params(1), BATCHES, kept)
    assert other.resumed == 0  # other arrays, another run


def test_muon_steps_every_direction_of_a_matrix_alike() -> None:
    plan = replace(PLAN, optimizer="muon", lr=0.03, warmup=1, weight_decay=0.0, budget=Budget(steps=1))
    start = {**params(), "scale": np.ones(8, np.float32)}

    def scaled(tree: Tree, batch: Batch, tick: Tick) -> tuple[jax.Array, Metrics]:
        return loss({**tree, "embed": tree["embed"] * tree["scale"][:, None]}, batch, tick)

    moved = fit(scaled, start, BATCHES, plan).params
    step = np.asarray(moved["embed"] - start["embed"])
    *sizes, none = np.linalg.svd(step, compute_uv=False)
    assert sizes[0] < 2 * sizes[-1]  # AdamW's differ by far more
    assert none < 1e-3 * sizes[-1]  # all logits up alike is no direction
    assert 0.1 * 0.03 < np.sqrt(np.square(step).mean()) < 0.4 * 0.03
    assert np.abs(moved["scale"] - 1).max() > 0  # no matrix: Adam's


def test_a_polite_kill_is_as_good_as_ctrl_c(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        fit(loss, params(), BATCHES, replace(PLAN, folder=tmp_path), watch=stop_at(3, signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before
    assert fit(loss, params(), BATCHES, replace(PLAN, folder=tmp_path)).resumed == 3


def test_a_checkpoint_now_and_then(tmp_path: Path) -> None:
    def crash(row: Row) -> None:
        if row.step == 6:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(loss, params(), BATCHES, replace(PLAN, folder=tmp_path, every=0.0), watch=crash)
    assert fit(loss, params(), BATCHES, replace(PLAN, folder=tmp_path)).resumed == 5


def ragged(step: int, tree: Tree) -> Batch:
    batch = BATCHES(step, tree)
    return {**batch, "mask": batch["mask"] & (np.arange(12)[None] < 1 + np.arange(8)[:, None])}


def quiet_loss(tree: Tree, batch: Batch, tick: Tick) -> tuple[jax.Array, Metrics]:
    """Without noise: parts of a batch draw their own."""
    return loss(tree, batch, replace(tick, progress=np.float32(1)))


def test_accumulated_parts_are_one_batch() -> None:
    whole = fit(quiet_loss, params(), ragged, PLAN)
    parts = fit(quiet_loss, params(), ragged, replace(PLAN, accumulate=4))
    np.testing.assert_allclose([r.loss for r in parts.history], [r.loss for r in whole.history], rtol=1e-5)
    assert parts.history[0].metrics["count"] == whole.history[0].metrics["count"] == 36
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_only_what_is_marked_is_trained() -> None:
    start = params()
    fitted = fit(loss, start, BATCHES, PLAN, trainable={"embed": False, "head": True})
    assert equal(fitted.params["embed"], start["embed"])
    assert not equal(fitted.params["head"], start["head"])


def test_a_budget_of_time() -> None:
    fitted = fit(loss, params(), BATCHES, replace(PLAN, budget=Budget(minutes=0.02)))
    assert fitted.seconds >= 1.2
    assert all(row.seconds < 1.2 for row in fitted.history[:-1])
    assert fitted.history[-1].progress == 1


def test_looks_before_during_and_after() -> None:
    fitted = fit(loss, params(), BATCHES, PLAN, evaluate=lambda tree: {"size": float(abs(tree["embed"]).sum())})
    assert [look.step for look in fitted.looks] == [0, 2, 4, 5, 7, 8]
    assert len({look.values["size"] for look in fitted.looks}) == 6
    told = fitted.json()
    assert told["looks"][-1]["step"] == told["history"][-1]["step"] == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": replace(PLAN, lr=float("inf"))}, "try a smaller lr"),
        ({"plan": replace(PLAN, accumulate=3)}, "a multiple of accumulate=3"),
        ({"trainable": False}, "no parameter is trainable"),
        ({"params": {"embed": np.arange(4), "head": [params()["head"][0]]}}, "no array of floats"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    given = {"loss": loss, "params": params(), "batches": BATCHES, "plan": PLAN, **change}
    with pytest.raises(EffcError, match=message):
        fit(**given)  # type: ignore[arg-type]


def test_what_training_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(EffcError, match=r"training needs optax.*pip install 'effc\[train\]'"):
        fit(loss, params(), BATCHES, PLAN)
