"""The TPU matmul in interpret mode against its reference; the TPU compiler's view of it is tested in backend/tpu."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.runtime import layers
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.generations import GENERATIONS
from effc.runtime.kernels.matmul import reference, steps, tiling, tpu
from effc.runtime.kernels.matmul.steps import Form
from effc.runtime.qarray import QArray, pack

SCALES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}


def coded(
    extent: int, width: int, group: int, bits: int, layout: str, sym: bool, seed: int = 0, scale: str = "f16"
) -> QArray:
    """Random codes with scales (and zero points) a group along K; the last group may be short."""
    rng = np.random.default_rng(seed)
    shape = (extent, width) if layout == "kn" else (width, extent)
    axis = -2 if layout == "kn" else -1
    grouped = list(shape)
    grouped[axis] = -(-extent // (group or extent))
    top = 2 ** (bits - 1)
    codes = rng.integers(-top, top, shape).astype(np.int8)
    scales = (rng.uniform(0.5, 2, grouped) * rng.choice([-1, 1], grouped)).astype(SCALES[scale])
    zeros = None if sym else jnp.asarray(rng.integers(-3, 3, grouped).astype(SCALES[scale]))
    stored = jnp.asarray(pack(codes) if bits <= 4 else codes)
    return QArray(stored, jnp.asarray(scales), zeros, bits, group, axis, shape[-1])


def activations(rows: int, extent: int, dtype: str = "float32") -> jax.Array:
    x = np.random.default_rng(1).standard_normal((rows, extent)).astype(np.float32)
    x[:, 3] *= 30  # one large channel: digits are relative to the greatest
    return jnp.asarray(x).astype(dtype)


def gap(have: jax.Array, want: jax.Array) -> float:
    """RMS of the difference over RMS of what is wanted."""
    a, b = np.asarray(have, np.float64), np.asarray(want, np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


SHAPES = st.tuples(
    st.sampled_from([1, 2, 3, 7, 8, 16, 33]), st.sampled_from([96, 128, 320, 384]), st.sampled_from([128, 200, 384]),
    st.sampled_from([0, 32, 64, 96, 128, 256]), st.sampled_from([4, 8]), st.booleans(),
    st.sampled_from(["f16", "bf16", "f32"]), st.sampled_from(["float32", "bfloat16"]), st.sampled_from([1, 2]),
)  # fmt: skip


Shape = tuple[int, int, int, int, int, bool, str, str, int]


def ties(x: jax.Array, w: QArray, digits: int) -> float:
    """As `gap`: what numbers halfway between digits, to f32's rounding, can change, a step each; 0 without any."""
    wide = np.asarray(x, np.float64)
    step = np.abs(wide).max(axis=-1, keepdims=True) / (127 * 128 if digits == 2 else 127)
    places = np.abs(wide / step)
    near = np.abs(places % 1 - 0.5) <= 4 * np.finfo(np.float32).eps * places
    dense = np.asarray(w.dequantize(), np.float64)
    return gap(jnp.asarray(near * step @ np.abs(dense) + wide @ dense), jnp.asarray(wide @ dense))


def check(shape: Shape) -> None:
    rows, extent, width, group, bits, sym, scale, dtype, digits = shape
    x, w = activations(rows, extent, dtype), coded(extent, width, group, bits, "kn", sym, scale=scale)
    assert tpu.fits(x, tpu.prepared(w), "kn")
    y = tpu.matmul(x, tpu.prepared(w), digits=digits, columns=128, interpret=True)
    assert gap(y, reference.matmul(x, w)) < (1e-3 if digits == 2 else 0.2)
    if dtype == "float32":  # numbers of few bits fall halfway between digits, and then either way
        summed = 5e-6  # f32 sums in another order
        assert gap(y, reference.matmul(reference.rounded(x, digits), w)) < summed + ties(x, w, digits)


@pytest.mark.parametrize(
    ("rows", "group", "layout", "sym", "dtype", "offset"),
    [(1, 128, "kn", True, "float32", 0.0), (8, 32, "kn", False, "bfloat16", 1.0), (5, 0, "nk", True, "float32", 1.0)],
)
def test_a_norm_that_is_taken_in(rows: int, group: int, layout: str, sym: bool, dtype: str, offset: float) -> None:
    """Digits are of x times the scale: what is left of the norm is one number a row."""
    x, w = activations(rows, 640), tpu.prepared(coded(640, 256, group, 8 if layout == "nk" else 4, layout, sym))
    scale = jnp.asarray(np.random.default_rng(2).uniform(0.2, 2, 640), dtype)
    assert tpu.fits_norm(x, w, scale, layout) and not tpu.fits_norm(jnp.zeros((65, 640)), w, scale, layout)
    how = {"eps": 1e-3, "offset": offset}
    have = tpu.of_norm(x, w, scale, **how, layout=layout, digits=2, interpret=True)
    normed = layers.norm(x, scale, kind="rms", **how)
    assert gap(have, reference.matmul(normed, w, layout)) < 1e-3
    assert gap(have, tpu.matmul(normed, w, layout=layout, interpret=True)) < 5e-4


@settings(max_examples=6, deadline=None)
@given(SHAPES)
def test_it_is_the_product_of_the_digits_and_that_is_close_to_the_product(shape: Shape) -> None:
    check(shape)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(SHAPES)
def test_many_products(shape: Shape) -> None:
    check(shape)


@pytest.mark.parametrize(("group", "digits"), [(32, 2), (128, 2), (0, 1)])
def test_many_rows_go_in_blocks(group: int, digits: int) -> None:
    x, w = activations(70, 256), coded(256, 200, group, 4, "kn", False)
    y = tpu.matmul(x, tpu.prepared(w), digits=digits, columns=128, interpret=True)
    assert y.shape == (70, 200)
    assert gap(y, reference.matmul(reference.rounded(x, digits), w)) < 5e-6


@pytest.mark.parametrize("layer", [0, 2])
def test_layers_of_a_stack(layer: int) -> None:
    alone = [tpu.prepared(coded(256, 128, 64, 4, "kn", True, seed)) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    x = activations(4, 256)
    y = tpu.matmul(x, stack, jnp.int32(layer), interpret=True)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(tpu.matmul(x, alone[layer], interpret=True)))


def test_rows_of_a_table_as_outputs() -> None:
    x, w = activations(3, 256), coded(256, 300, 0, 8, "nk", True)
    assert tpu.fits(x, w, "nk")
    assert gap(tpu.matmul(x, w, layout="nk", interpret=True), reference.matmul(x, w, "nk")) < 1e-3


@pytest.mark.parametrize(("rows", "group"), [(8, 128), (2, 128), (8, 32), (1, 32), (65, 64)])
def test_whole_numbers_are_exact(rows: int, group: int) -> None:
    """Sums of whole numbers whose digits are exact come out exact: int32 all the way, one scale of 1."""
    x = np.random.default_rng(3).integers(-127, 128, (rows, 256)).astype(np.float32)
    x[:, 0] = 127 * 128  # so that t is 1
    w = coded(256, 128, group, 4, "kn", True)
    w = QArray(w.codes, jnp.ones_like(w.scales), None, 4, group, -2, 128)
    want = x.astype(np.int64) @ np.asarray(w.unpacked(), np.int64)
    np.testing.assert_array_equal(np.asarray(tpu.matmul(jnp.asarray(x), tpu.prepared(w), interpret=True)), want)


def test_a_row_of_zeros_is_zero() -> None:
    w = coded(128, 128, 32, 4, "kn", True)
    y = tpu.matmul(jnp.zeros((2, 128), jnp.float32), tpu.prepared(w), interpret=True)
    np.testing.assert_array_equal(np.asarray(y), 0)


def test_half_floats_by_their_bits_are_exact() -> None:
    halves = np.arange(-(2**15), 2**15).astype(np.int16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    have = np.asarray(steps.half(jnp.asarray(halves.view(np.int16))))
    np.testing.assert_array_equal(have, halves.astype(np.float32))


def test_prepared_columns_are_whole_lanes_of_the_same_array() -> None:
    w = coded(64, 200, 32, 4, "kn", False)
    ready = tpu.prepared(w)
    assert ready.codes.shape == (64, 256) and ready.codes.dtype == jnp.int4 and ready.shape == w.shape
    np.testing.assert_array_equal(np.asarray(ready.unpacked()), np.asarray(w.unpacked()))
    np.testing.assert_array_equal(np.asarray(ready.dequantize()), np.asarray(w.dequantize()))


def test_what_it_does_not_take() -> None:
    x = activations(2, 384)
    assert not tpu.fits(x, tpu.prepared(coded(384, 128, 48, 4, "kn", True)), "kn")  # parts registers of codes
    assert not tpu.fits(x, coded(384, 128, 32, 4, "kn", True), "kn")  # two codes a byte
    assert not tpu.fits(x, coded(384, 128, 32, 8, "nk", True), "nk")  # groups of a table's rows
    with on_tpu.traced("v4"):
        assert not tpu.fits(x, coded(384, 128, 0, 8, "kn", True), "kn")  # its matrix unit takes no int8


@pytest.mark.parametrize("chip", GENERATIONS)
def test_tiles_are_whole_lanes_or_all_columns_and_fit(chip: str) -> None:
    for rows, extent, width, group in ((1, 4096, 4096, 128), (16, 14336, 4096, 32), (64, 576, 1536, 32)):
        form = Form(rows, extent, 0, group, strip=GENERATIONS[chip].unit)
        columns = tiling.columns(form, width, 4, [2], chip)
        assert columns == width or columns % 128 == 0
        sized = Form(rows, extent, columns, group)
        assert tiling.vmem(sized, 4, [2]) < tiling.VMEM[chip]


def test_the_faster_the_memory_the_larger_the_tile() -> None:
    form = Form(8, 4096, 0, 128)
    assert tiling.columns(form, 4096, 4, [2], "v5e") < tiling.columns(form, 4096, 4, [2], "v5p")
