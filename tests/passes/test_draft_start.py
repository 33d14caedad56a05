"""A head begins as the best linear reader of its lesson: what is linear in it is found, and the layer is silent."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.passes.base import Notes
from effc.passes.draft import Draft, start
from effc.passes.draft.lesson import Lesson
from tests.runtime.conftest import TINY, random_params

WIDTH, LENGTH = 6, 40


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def world() -> tuple[Lesson, Any, np.ndarray]:
    """Features of two depths; the last is a turn of the last before and of the token, normed."""
    rng = np.random.default_rng(0)
    table, turn = rng.standard_normal((11, WIDTH)), rng.standard_normal((2 * WIDTH, WIDTH)) / WIDTH
    tokens = rng.integers(0, 11, (200, LENGTH)).astype(np.int32)
    features = rng.standard_normal((200, LENGTH, 2 * WIDTH))
    for i in range(1, LENGTH):
        inputs = np.concatenate([_unit(features[:, i - 1, WIDTH:]), _unit(table[tokens[:, i]])], axis=-1)
        features[:, i, WIDTH:] = 3 * _unit(inputs @ turn)
    spans = np.tile(np.asarray([[5, LENGTH]], np.int32), (200, 1))
    chunk = {"tokens": tokens, "spans": spans, "features": features.astype(np.float16)}
    return Lesson([chunk]), lambda ids: table[ids].astype(np.float32), turn


def test_what_the_next_features_are_made_of_is_found(world: tuple[Lesson, Any, np.ndarray]) -> None:
    lesson, embed, _ = world
    readers = start.solved(lesson, embed, WIDTH)
    x, y = start.rows(lesson.chunks[0], embed, WIDTH, None)
    assert len(x) == 200 * (LENGTH - 4)  # position 4 stands before the first that is learned
    left = np.square(_unit(x @ readers) - y).mean() / np.square(y).mean()
    assert left < 0.05
    blind = np.square(_unit(np.where(np.arange(x.shape[1]) < WIDTH, x, 0) @ readers) - y).mean()
    assert blind > 10 * left  # the first depth tells nothing here


def test_the_second_step_is_solved_for_too(world: tuple[Lesson, Any, np.ndarray]) -> None:
    lesson, embed, _ = world
    readers = start.solved(lesson, embed, WIDTH)
    x, y = start.rows(lesson.chunks[0], embed, WIDTH, readers)
    assert len(x) == 200 * (LENGTH - 4)
    np.testing.assert_allclose(x[:, :WIDTH], x[:, WIDTH : 2 * WIDTH])  # what a head made stands for every depth
    assert np.square(_unit(x @ readers) - y).mean() / np.square(y).mean() < 0.1


def _attached() -> Module:
    return Draft(kind="head", vocab=16).run(parse(TINY.read_text()), Notes())


def test_the_layer_adds_nothing_at_first() -> None:
    module = _attached()
    width = int(str(module.params["draft.reads.0.w"].type.shape[0]))
    silent = start.outgoing(module, width)
    assert [name.split(".")[-1] for name in silent] == ["o", "down"]
    program = load_program(emit(start.embedding("draft", module)))
    params = random_params(program, seed=1)
    tokens = jnp.asarray([[1, 2, 3]])
    assert program.forward(params, tokens).shape == (1, 3, width)
