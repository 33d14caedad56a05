"""A decoder of two layers, random arrays for any module, and passes run on both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.stream import run
from effc.passes import runner
from effc.pipeline import Pipeline
from effc.weights import Lazy, Store, parts

TINY = Path(__file__).parent / "tiny.effc"

Ran = tuple[Module, Store, list[runner.Step]]


@pytest.fixture
def tiny() -> Module:
    """tests/passes/tiny.effc."""
    return parse(TINY.read_text())


@pytest.fixture
def random_store() -> Callable[[Module], Store]:
    """Dense arrays for every parameter, the same for the same name; vectors are near one."""

    def make(module: Module) -> Store:
        return Store({name: _lazy(module, name) for name in module.params})

    return make


def _lazy(module: Module, name: str) -> Lazy:
    param = module.params[name]
    part = parts(param.type)[""]

    def read(layer: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([*name.encode(), layer])
        near = 1.0 if len(part.shape) == 1 else 0.0
        return {"": (near + 0.1 * rng.standard_normal(part.shape)).astype(part.dtype)}

    return Lazy(param, read)


@pytest.fixture
def apply() -> Callable[[Module, Store, str], Ran]:
    """A pipeline on structure and arrays, every pass checked."""

    def call(module: Module, store: Store, passes: str) -> Ran:
        steps = runner.run(module, Pipeline.parse(passes).ordered())
        for step in steps:
            store = step.made_by.weights(step.before, step.after, store)
        return (steps[-1].after if steps else module), store, steps

    return call


@pytest.fixture
def logits() -> Callable[[Module, Store], np.ndarray]:
    """Of twelve fixed tokens in two rows."""

    def call(module: Module, store: Store) -> np.ndarray:
        vocab = int(str(module.forward().result_types()[0].shape[-1]))
        tokens = np.random.default_rng(0).integers(0, vocab, (2, 6))
        return np.asarray(run(module, store, jnp.asarray(tokens)))

    return call
