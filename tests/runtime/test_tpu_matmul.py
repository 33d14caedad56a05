"""The TPU matmul in interpret mode against its reference; the TPU compiler's view of it is tested in backend/tpu."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.runtime.kernels.matmul import tpu
from effc.runtime.qarray import QArray, pack


def coded(extent: int, width: int, group: int, bits: int, layout: str, sym: bool, seed: int = 0) -> QArray:
    """Random codes with scales (and zero points) a group along K."""
    rng = np.random.default_rng(seed)
    shape = (extent, width) if layout == "kn" else (width, extent)
    axis = -2 if layout == "kn" else -1
    grouped = list(shape)
    grouped[axis] = extent // (group or extent)
    top = 2 ** (bits - 1)
    codes = rng.integers(-top, top, shape).astype(np.int8)
    scales = rng.uniform(0.5, 2, grouped).astype(np.float16)
    zeros = None if sym else jnp.asarray(rng.integers(-3, 3, grouped).astype(np.float16))
    stored = jnp.asarray(pack(codes) if bits <= 4 else codes)
    return QArray(stored, jnp.asarray(scales), zeros, bits, group, axis, shape[-1])


def gap(x: np.ndarray, w: QArray, layout: str) -> float:
    """RMS of the difference over RMS of the exact product."""
    dense = np.asarray(w.dequantize(), np.float64)
    want = x.astype(np.float64) @ (dense if layout == "kn" else dense.T)
    have = np.asarray(tpu.matmul(jnp.asarray(x), tpu.prepared(w), layout, interpret=True), np.float64)
    return float(np.sqrt(np.mean((have - want) ** 2) / np.mean(want**2)))


SHAPES = st.tuples(
    st.sampled_from([1, 2, 7, 8, 16]), st.sampled_from([128, 256, 384]), st.sampled_from([128, 200, 256]),
    st.sampled_from([0, 32, 64, 128]), st.sampled_from([4, 8]), st.booleans(),
)  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(SHAPES)
def test_it_is_the_product_to_15_bits_of_activations(shape: tuple[int, int, int, int, int, bool]) -> None:
    rows, extent, width, group, bits, sym = shape
    x = np.random.default_rng(1).standard_normal((rows, extent)).astype(np.float32)
    x[:, 3] *= 30  # one large channel: digits are relative to the greatest
    w = coded(extent, width, group, bits, "kn", sym)
    assert tpu.fits(jnp.asarray(x), tpu.prepared(w), "kn")
    assert gap(x, w, "kn") < 1e-3


def test_rows_of_a_table_as_outputs() -> None:
    x = np.random.default_rng(2).standard_normal((3, 256)).astype(np.float32)
    w = coded(256, 300, 0, 8, "nk", True)
    assert tpu.fits(jnp.asarray(x), w, "nk") and gap(x, w, "nk") < 1e-3


def test_whole_numbers_are_exact() -> None:
    """Sums of whole numbers whose digits are exact come out exact: int32 all the way, one scale of 1."""
    x = np.random.default_rng(3).integers(-127, 128, (8, 256)).astype(np.float32)
    x[:, 0] = 127 * 128  # so that t is 1
    w = coded(256, 128, 128, 4, "kn", True)
    w = QArray(w.codes, jnp.ones_like(w.scales), None, 4, 128, -2, 128)
    want = x.astype(np.int64) @ np.asarray(w.unpacked(), np.int64)
    np.testing.assert_array_equal(np.asarray(tpu.matmul(jnp.asarray(x), tpu.prepared(w), "kn", interpret=True)), want)


def test_a_row_of_zeros_is_zero() -> None:
    w = coded(128, 128, 32, 4, "kn", True)
    y = tpu.matmul(jnp.zeros((2, 128), jnp.float32), tpu.prepared(w), "kn", interpret=True)
    np.testing.assert_array_equal(np.asarray(y), 0)


@pytest.mark.parametrize(("rows", "group"), [(65, 32), (8, 96)])
def test_what_it_does_not_take(rows: int, group: int) -> None:
    assert not tpu.fits(jnp.zeros((rows, 384)), tpu.prepared(coded(384, 128, group, 4, "kn", True)), "kn")


def test_tiles_are_whole_lanes_or_all_columns() -> None:
    assert tpu.tile(4096, 4096, 4) == 1024 and tpu.tile(14336, 4096, 4) == 256 and tpu.tile(576, 1536, 4) == 1536
