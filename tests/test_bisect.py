"""effc bisect: the layer that was spoilt is named, other models are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from effc.bisect import bisect
from effc.errors import EffcError
from effc.evaluate import Windows
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.opened import Opened
from effc.passes import Quant4, runner
from effc.weights import Lazy, Store, parts

TEXT = Windows((np.random.default_rng(0).integers(0, 160, (1, 24), np.int32),), 1, source="random tokens")


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Opened:
    """The tiny decoder in f32."""
    module = parse(request.path.parent.joinpath("passes", "tiny.effc").read_text())
    return Opened(Path("before"), module, Store({name: _lazy(module, name) for name in module.params}))


def _lazy(module: Module, name: str) -> Lazy:
    shape = parts(module.params[name].type)[""].shape

    def read(layer: int) -> dict[str, np.ndarray]:
        noise = np.random.default_rng([*name.encode(), layer]).standard_normal(shape)
        return {"": (0.1 * noise + (len(shape) == 1)).astype(np.float32)}

    return Lazy(module.params[name], read)


def _coded(other: Opened, spoil: Callable[[str, Lazy], Lazy] = lambda name, lazy: lazy) -> Opened:
    made_by, module = Quant4(group=16), other.module
    after = runner.step(made_by, module).after
    store = made_by.weights(module, after, other.store)
    return Opened(Path("after"), after, Store({name: spoil(name, lazy) for name, lazy in store.entries.items()}))


def test_the_spoilt_layer_hurts_most(other: Opened) -> None:
    def spoil(name: str, lazy: Lazy) -> Lazy:
        def read(layer: int) -> dict[str, np.ndarray]:
            arrays = dict(lazy.read(layer))
            return arrays | {"scales": arrays["scales"] * 2} if layer == 1 else arrays

        return Lazy(lazy.param, read) if name == "layers.mlp.down" else lazy

    found = bisect(_coded(other, spoil), other, TEXT)
    assert found.worst.name == "@layer[1]"
    assert max(found.params, key=lambda part: part.kl).name == "@layers.mlp.down"
    assert [part.name for part in found.layers] == ["@layer[0]", "@layer[1]", "outside of layers"]
    assert found.whole > found.layers[0].kl > 0
    assert found.json()["worst"] == "@layer[1]"


def test_the_same_model_hurts_nowhere(other: Opened) -> None:
    found = bisect(other, other, TEXT)
    assert found.whole == 0 and all(part.kl == 0 for part in found.layers)


def test_where_scales_were_folded_parameters_are_not_taken_alone(other: Opened) -> None:
    def spoil(name: str, lazy: Lazy) -> Lazy:
        return Lazy(lazy.param, lambda i: {"": lazy.read(i)[""] * 2}) if name == "norm" else lazy

    found = bisect(_coded(other, spoil), other, TEXT)
    assert found.params == [] and "norm and others changed too" in found.notes[0]


def test_other_parameters_are_refused(other: Opened) -> None:
    params = {("norms" if name == "norm" else name): p for name, p in other.module.params.items()}
    wrong = replace(other, module=replace(other.module, params=params))
    with pytest.raises(EffcError, match="after: no parameter 'norms' of before; did you mean 'norm'"):
        bisect(_coded(other), wrong, TEXT)
    coded = _coded(other)
    with pytest.raises(EffcError, match="want the model before quantization"):
        bisect(coded, coded, TEXT)
