"""Quantized arrays: the stored layout, values, and the layers that take them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.runtime import forms, layers
from effc.runtime.qarray import QArray, pack, unpack

RNG = np.random.default_rng(0)


def made(shape: tuple[int, ...], *, bits: int, group: int, axis: int, sym: bool) -> tuple[QArray, np.ndarray]:
    """A quantized array and what it stands for, element by element."""
    codes = RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
    size = group or shape[axis]
    grouped = list(shape)
    grouped[axis] = -(-shape[axis] // size)
    scales = RNG.uniform(0.5, 2.0, grouped).astype(np.float16)
    zeros = None if sym else RNG.uniform(-3, 3, grouped).astype(np.float16)
    of = np.arange(shape[axis]) // size
    spread = lambda x: np.take(x.astype(np.float32), of, axis=axis)  # noqa: E731
    values = (codes - (0 if zeros is None else spread(zeros))) * spread(scales)
    stored = pack(codes) if bits <= 4 else codes
    parts = (jnp.asarray(stored), jnp.asarray(scales), None if zeros is None else jnp.asarray(zeros))
    return QArray(*parts, bits, group, axis, shape[-1]), values


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.integers(0, 37), st.integers(0, 2**32 - 1))
def test_stored_codes_come_back(bits: int, width: int, seed: int) -> None:
    """Every code, rows of their own bytes, nothing in what is left of the last."""
    low = -(1 << bits - 1)
    codes = np.random.default_rng(seed).integers(low, -low, (3, width)).astype(np.int8)
    stored = forms.pack(codes, bits)
    assert stored.shape == (3, forms.row_bytes(width, bits))
    assert (forms.unpack(stored, width, bits) == codes).all()
    bitwise = [[(int(c) >> i) & 1 for c in row for i in range(bits)] for row in codes]
    assert (np.packbits(np.asarray(bitwise, np.uint8).reshape(3, -1), -1, "little") == stored.view(np.uint8)).all()
    kept = forms.held(stored, width, bits)
    assert (np.asarray(unpack(jnp.asarray(kept), width) if bits <= 4 else kept) == codes).all()


@pytest.mark.parametrize("form", sorted(forms.BITS))
def test_each_code_of_a_form_stands_for_its_value(form: str) -> None:
    bits = forms.BITS[form]
    codes = np.arange(-(1 << bits - 1), 1 << bits - 1).astype(np.int8)
    values = forms.decode(codes, form)
    finite = codes[np.isfinite(values)]
    again = forms.decode(forms.encode(values[np.isfinite(values)], form), form)
    assert (again == forms.decode(finite, form)).all()
    stored = jnp.asarray(forms.held(forms.pack(codes[None], bits), len(codes), bits))
    ones = jnp.ones((1, 1), jnp.float32)
    got = QArray(stored, ones, None, bits, 0, -1, len(codes), form).dequantize()
    np.testing.assert_array_equal(np.asarray(got)[0], values)


CASES = [
    (shape, bits, group, axis)
    for shape, group, axis in [
        ((12, 10), 4, -2),
        ((13, 7), 4, -2),
        ((12, 10), 0, -2),
        ((6, 16), 8, -1),
        ((6, 15), 8, -1),
    ]
    for bits in (2, 4, 8)
]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("shape", "bits", "group", "axis"), CASES)
def test_dequantize(shape: tuple[int, int], bits: int, group: int, axis: int, sym: bool) -> None:
    array, values = made(shape, bits=bits, group=group, axis=axis, sym=sym)
    assert array.shape == shape and array.sym == sym
    np.testing.assert_allclose(array.dequantize(), values, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_packing_round_trips(width: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (3, width)).astype(np.int8)
    packed = pack(codes)
    assert packed.shape == (3, (width + 1) // 2) and packed.dtype == np.uint8
    assert (np.asarray(unpack(jnp.asarray(packed), width)) == codes).all()


def test_the_stored_bytes_are_low_half_first() -> None:
    assert pack(np.array([[1, -1, 7]], np.int8)).tolist() == [[0xF1, 0x07]]


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("layout", "axis", "inner", "outer", "group"),
    [
        ("kn", -2, 48, 21, 16),
        ("kn", -2, 40, 22, 16),  # a short last group
        ("kn", -2, 300, 22, 0),  # one group, wider than what is taken at once
        ("kn", -1, 40, 22, 11),  # grouped along the outputs
        ("nk", -1, 48, 600, 16),  # several blocks of outputs, the last one short
        ("nk", -1, 40, 22, 0),
        ("nk", -1, 41, 22, 16),
    ],
)
def test_linear(rows: int, bits: int, sym: bool, layout: str, axis: int, inner: int, outer: int, group: int) -> None:
    shape = (inner, outer) if layout == "kn" else (outer, inner)
    array, values = made(shape, bits=bits, group=group, axis=axis, sym=sym)
    x = RNG.standard_normal((rows, inner)).astype(np.float32)
    want = x @ (values if layout == "kn" else values.T)
    got = layers.linear(jnp.asarray(x), array, layout=layout)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())  # sums in f32


def test_embed_reads_only_the_rows_asked_for() -> None:
    array, values = made((50, 24), bits=4, group=8, axis=-1, sym=False)
    ids = jnp.array([[3, 49, 3]])
    np.testing.assert_allclose(layers.embed(ids, array), values[np.asarray(ids)], rtol=1e-6)
    jaxpr = jax.make_jaxpr(layers.embed)(ids, array)
    assert max(v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars) < 50 * 24


def test_it_is_a_pytree_that_survives_jit() -> None:
    array, values = made((12, 10), bits=4, group=4, axis=-2, sym=True)
    again = jax.jit(lambda a: a)(array)
    assert (again.bits, again.group, again.axis, again.shape) == (4, 4, -2, (12, 10))
    np.testing.assert_allclose(again.dequantize(), values, rtol=1e-6)
