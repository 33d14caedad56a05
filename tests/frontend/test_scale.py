"""Lowering grows no faster than the layers, and holds no weights."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effc
from effc.frontend import lower
from effc.frontend.source import Source, Spec
from effc.weights import write_safetensors
from tests.frontend import zoo


def stack(layers: int) -> Source:
    module = zoo.Decoder(windows=(0,) * layers)
    spec = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda x: np.full(x.shape, 0.01, x.dtype), spec)
    return effc.load(module, params, name="stack", context=64)


def seconds(layers: int) -> float:
    """Of this process alone: others on the machine do not count."""
    source = stack(layers)
    start = time.process_time()
    (repeat,) = [op for op in lower(source).module.forward().ops if op.kind == "repeat"]
    assert repeat.attrs["times"] == layers
    return time.process_time() - start


def test_four_times_the_layers_take_no_more_than_about_four_times_as_long() -> None:
    seconds(2)  # what is compiled once
    assert seconds(16) < 7 * seconds(4)


@pytest.mark.slow
def test_thirty_layers_take_less_than_fifteen_seconds() -> None:
    assert seconds(30) < 15


class Watched:
    """Weights that are made when read; knows how many bytes of them are held at once."""

    def __init__(self, spec: Mapping[str, Spec]) -> None:
        self.specs, self.held, self.most, self.reads = spec, 0, 0, 0

    def names(self) -> Iterable[str]:
        return self.specs

    def spec(self, name: str) -> Spec:
        return self.specs[name]

    def read(self, name: str) -> np.ndarray:
        array = np.full(self.specs[name].shape, 0.01, self.specs[name].dtype)
        self.reads, self.held = self.reads + 1, self.held + array.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(array, self._gone, array.nbytes)
        return array

    def _gone(self, size: int) -> None:
        self.held -= size


def test_no_weight_is_read_by_lowering_and_none_kept_by_writing(tmp_path: Any) -> None:
    source = stack(6)
    specs = {name: source.weights.spec(name) for name in source.weights.names()}
    watched = Watched(specs)
    lowered = lower(replace(source, weights=watched))
    assert watched.reads == 0
    write_safetensors(tmp_path / "model.safetensors", lowered.module, lowered.store)
    sizes = [int(np.prod(spec.shape)) * 4 for spec in specs.values()]
    assert watched.reads == len(sizes)
    assert watched.most <= 2 * max(sizes) < sum(sizes) / 4
