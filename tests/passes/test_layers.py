"""A model with fewer of its layers: which, what is read, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effc.errors import EffcError
from effc.ir.core import Module
from effc.ir.rewrite import replace_ops
from effc.ir.verify import verify
from effc.passes.layers import layer_store, stepwise, with_layers
from effc.weights import Store

Logits = Callable[[Module, Store], np.ndarray]


@given(st.integers(2, 60), st.data())
def test_stepwise_goes_from_end_to_end(layers: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(2, layers))
    ids = stepwise(layers, keep)
    assert len(ids) == keep == len(set(ids)) and list(ids) == sorted(ids)
    assert (ids[0], ids[-1]) == (0, layers - 1)
    assert all(abs(Fraction(i * (layers - 1), keep - 1) - x) <= Fraction(1, 2) for i, x in enumerate(ids))


def test_all_layers_are_the_model(tiny: Module, random_store: Callable[[Module], Store], logits: Logits) -> None:
    store = random_store(tiny)
    whole = with_layers(tiny, (0, 1))
    assert np.array_equal(logits(whole, layer_store(tiny, (0, 1), store)), logits(tiny, store))


def test_a_layer_less_reads_the_arrays_of_those_kept(
    tiny: Module, random_store: Callable[[Module], Store], logits: Logits
) -> None:
    store, shorter = random_store(tiny), with_layers(tiny, (1,))
    assert verify(shorter) == []
    kept = layer_store(tiny, (1,), store)
    name = "layers.attn.q"
    assert np.array_equal(kept[name].read(0)[""], store[name].read(1)[""])
    assert shorter.params[name].stack == 1 and "layers 1 of" in shorter.params[name].path
    func = shorter.forward()
    once = replace_ops(func, lambda op: [replace(op, attrs={**op.attrs, "start": 1})] if op.kind == "repeat" else None)
    by_start = replace(tiny, funcs={**tiny.funcs, func.name: once})
    np.testing.assert_allclose(logits(shorter, kept), logits(by_start, store), atol=1e-6)


@pytest.mark.parametrize("ids", [(), (2,), (0, 0), (1, 0), (-1, 0)])
def test_refused(tiny: Module, ids: tuple[int, ...]) -> None:
    with pytest.raises(EffcError, match="want numbers of 0 to 1"):
        with_layers(tiny, ids)


def test_without_a_stack(tiny: Module) -> None:
    func = tiny.forward()
    cut = [replace(op, attrs={**op.attrs, "start": 1, "times": 1}) if op.kind == "repeat" else op for op in func.ops]
    with pytest.raises(EffcError, match="want a stack of equal ones"):
        with_layers(tiny.with_func(replace(func, ops=tuple(cut))), (0,))
