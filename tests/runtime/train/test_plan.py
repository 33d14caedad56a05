"""Budgets, learning rates, batches, names of leaves: all that `fit` is told."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.ir.parser import parse
from effc.runtime.train import Budget, Plan, by_name, chosen, places, sequences, windows
from effc.runtime.train.tree import Leaf, flags, put, take

TINY = Path(__file__).parent.parent / "tiny.effc"


@pytest.mark.parametrize("text", ["500", "500 steps", "10m", "1.5m", "90s", "30s", "0"])
def test_budgets_are_spelled_back(text: str) -> None:
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget
    assert bool(budget) == (text != "0")


def test_budgets() -> None:
    assert Budget.parse("2h") == Budget(minutes=120)
    assert Budget(steps=10).spent(5, 1e9) == 0.5
    assert Budget(minutes=2).spent(10**9, 30) == 0.25
    assert Budget(steps=300).share(1 / 3) == Budget(steps=100)
    assert Budget().spent(0, 0) == 1


@pytest.mark.parametrize("text", ["", "m", "-5", "5x", "1.5", "10 m 3"])
def test_budgets_refused(text: str) -> None:
    with pytest.raises(EffcError, match="want steps"):
        Budget.parse(text)


def rates(schedule: str) -> list[float]:
    plan = Plan(Budget(steps=100), lr=2.0, warmup=10, floor=0.1, decay=0.2, schedule=schedule)  # type: ignore[arg-type]
    return [plan.rate(step, step / 100) for step in range(101)]


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid", "constant"])
def test_learning_rates(schedule: str) -> None:
    told = rates(schedule)
    assert told[0] < 0.11 * told[9]
    assert all(a >= b for a, b in pairwise(told[10:]))
    end = 2.0 if schedule == "constant" else 0.2
    assert told[-1] == pytest.approx(end)


def test_a_trapezoid_is_flat_until_it_decays() -> None:
    told = rates("trapezoid")
    assert set(told[9:80]) == {2.0}
    assert told[90] == pytest.approx(1.1)


def test_windows_depend_on_seed_and_step_alone() -> None:
    ids = np.arange(100)
    one, two, other = (windows(ids, length=6, rows=3, seed=seed, head=(7,)) for seed in (1, 1, 2))
    batch = one(4, None)
    assert np.array_equal(batch["tokens"], two(4, "anything")["tokens"])
    assert not np.array_equal(batch["tokens"], one(5, None)["tokens"])
    assert not np.array_equal(batch["tokens"], other(4, None)["tokens"])
    assert batch["tokens"].shape == (3, 7) and batch["mask"].shape == (3, 6)
    assert (batch["tokens"][:, 0] == 7).all()
    assert (np.diff(batch["tokens"][:, 1:]) == 1).all()


def test_sequences_come_once_before_any_comes_again() -> None:
    samples = np.arange(10)[:, None] * np.ones((1, 4), int)
    batches = sequences(samples, rows=5, seed=0)
    seen = np.concatenate([batches(step, None)["tokens"][:, 0] for step in range(2)])
    assert sorted(seen) == list(range(10))
    later = np.concatenate([batches(step, None)["tokens"][:, 0] for step in range(2, 4)])
    assert sorted(later) == list(range(10)) and list(later) != list(seen)


def test_a_text_too_short() -> None:
    with pytest.raises(EffcError, match="a text of 5 tokens, want 8"):
        windows(np.arange(5), length=7, rows=1)


def test_leaves_by_name() -> None:
    table = load_program(emit(parse(TINY.read_text()))).params
    tree = places(table)
    names = by_name(table, tree)
    assert names["layers.attn.q"] == [Leaf("layers.attn.q", layer) for layer in range(3)]
    assert names["embed"] == [Leaf("embed")]
    mask = chosen(table, "*.attn.*|norm")
    assert {leaf.name for leaf, on in zip(_leaves(tree), flags(tree, mask), strict=True) if on} == {
        "norm", "layers.attn.q", "layers.attn.k", "layers.attn.v", "layers.attn.o",
    }  # fmt: skip
    with pytest.raises(EffcError, match=r"trainable: 'layers.attn.qq' fits none of \d+ parameters.*layers.attn.q"):
        chosen(table, "layers.attn.qq")


def _leaves(tree: object) -> list[Leaf]:
    import jax

    return jax.tree.leaves(tree)


def test_taken_and_put_back() -> None:
    tree = {"b": [np.ones(2, np.float32), np.zeros(3, np.float32)], "a": np.full(1, 5.0, np.float32)}
    mask = {"a": False, "b": [True, False]}
    kept = take(tree, mask)
    assert [x.tolist() for x in kept.values()] == [[1, 1]]
    moved = put(tree, {path: x + 1 for path, x in kept.items()}, mask)
    assert moved["b"][0].tolist() == [2, 2] and moved["b"][1] is tree["b"][1] and moved["a"] is tree["a"]
