"""The arithmetic of coding: bounds, fixed points, packing, methods."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from effc.errors import EffcError
from effc.ir.types import Quant
from effc.passes.quantizer import Method, nearest_codes, quantize
from effc.runtime.forms import BITS, held, limits, pack
from effc.runtime.qarray import QArray

SHAPES = st.sampled_from([(1, 1), (7, 3), (33, 5), (40, 8)])  # few, as each is compiled
FLOATS = st.floats(-8, 8, width=32, allow_subnormal=False)
MATRICES = arrays(np.float32, SHAPES, elements=FLOATS)
QUANTS = st.builds(
    Quant,
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    group=st.sampled_from([0, 4, 7, 32]),
    sym=st.booleans(),
    scale=st.just("f32"),
    axis=st.sampled_from([-1, -2]),
)


def restored(x: np.ndarray, quant: Quant, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """The array that the codes stand for, and the scale of each element."""
    coded = quantize(x, quant, method, "w")
    args = (quant.bits, quant.group, quant.axis, x.shape[-1], quant.form)
    codes = held(coded["codes"], x.shape[-1], quant.bits)
    array = QArray(codes, coded["scales"], coded.get("zeros"), *args)  # type: ignore[arg-type]
    scale = np.repeat(coded["scales"].astype(np.float32), quant.group or x.shape[quant.axis], quant.axis)
    return np.asarray(array.dequantize()), scale[: x.shape[0], : x.shape[1]]


@settings(deadline=None, max_examples=60)
@given(MATRICES, QUANTS)
def test_no_error_exceeds_half_a_step(x: np.ndarray, quant: Quant) -> None:
    back, scale = restored(x, quant, "absmax")
    room = 1 if quant.sym else 2  # a rounded zero point may cost as much again
    assert (np.abs(back - x) <= room * np.abs(scale) * (0.5 + 1e-5) + 1e-30).all()


@settings(deadline=None, max_examples=40)
@given(MATRICES, QUANTS.filter(lambda q: q.sym))
def test_least_squares_never_loses_to_absmax(x: np.ndarray, quant: Quant) -> None:
    wrong = {m: np.sum((restored(x, quant, m)[0] - x).astype(np.float64) ** 2) for m in ("mse", "absmax")}
    assert wrong["mse"] <= wrong["absmax"] * (1 + 1e-5) + 1e-12


@settings(deadline=None, max_examples=30)
@given(MATRICES, QUANTS, st.sampled_from(["mse", "absmax"]))
def test_zeros_stay_zero(x: np.ndarray, quant: Quant, method: Method) -> None:
    back, _ = restored(np.where(x > 0, x, 0), quant, method)
    assert (back[x <= 0] == 0).all()


@settings(deadline=None, max_examples=30)
@given(MATRICES, st.sampled_from([4, 8]))
def test_what_codes_stand_for_has_the_same_codes_at_the_same_scale(x: np.ndarray, bits: int) -> None:
    quant = Quant(bits, 0)
    coded = quantize(x, quant, "absmax", "w")
    back, scale = restored(x, quant, "absmax")
    again = pack(nearest_codes(back, scale, quant).astype(np.int8)) if bits <= 4 else nearest_codes(back, scale, quant)
    assert (again == coded["codes"]).all()


FORMS = st.builds(
    lambda form, group, axis: Quant(BITS[form], group, True, "f32", axis, form),
    st.sampled_from(sorted(BITS)),
    st.sampled_from([0, 4, 7, 32]),
    st.sampled_from([-1, -2]),
)


@settings(deadline=None, max_examples=40)
@given(MATRICES, FORMS)
def test_forms_reach_the_greatest_and_keep_zero(x: np.ndarray, quant: Quant) -> None:
    back, scale = restored(x, quant, "absmax")
    steps = {"nf4": 0.153, "fp4e2m1": 1.0, "fp8e4m3": 16.0, "fp8e5m2": 4096.0}[quant.form]  # half of the widest
    assert (np.abs(back - x) <= steps * scale * (1 + 1e-5) + 1e-30).all()
    assert (back[x == 0] == 0).all()


@settings(deadline=None, max_examples=30)
@given(MATRICES, FORMS)
def test_forms_least_squares_never_loses(x: np.ndarray, quant: Quant) -> None:
    wrong = {m: np.sum((restored(x, quant, m)[0] - x).astype(np.float64) ** 2) for m in ("mse", "absmax")}
    assert wrong["mse"] <= wrong["absmax"] * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("form", sorted(BITS))
def test_scales_of_mx_are_powers_of_two(form: str) -> None:
    x = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    quant = Quant(BITS[form], 32, True, "f8e8m0", -2, form)
    back, scale = restored(x, quant, "mse")
    assert (np.log2(scale) % 1 == 0).all()
    assert np.abs(back).max() <= limits(form, 0)[1] * scale.max()
    plain, _ = restored(x, Quant(BITS[form], 32, True, "f32", -2, form), "mse")
    assert np.square(back - x).mean() <= 3 * np.square(plain - x).mean() + 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_whole_range_of_codes_is_used(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = np.arange(low, high + 1, dtype=np.float32)[:, None]
    x[0] = -high - 0.5  # what the last bucket still holds: the scale is one
    back, scale = restored(x, Quant(bits, 0), "absmax")
    assert (scale == 1).all()
    assert (back[:, 0] == np.arange(low, high + 1)).all()


def test_half_precision_scales_are_those_the_codes_were_made_with() -> None:
    x = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    back, scale = restored(x, Quant(4, 16, True, "f16"), "absmax")
    limit = np.abs(scale) * (0.5 + 7.5 * 2**-11)  # half a step, and what rounding the scale takes off the last code
    assert (np.abs(back - x) <= limit).all()


def test_blocks_do_not_show() -> None:
    """An array of many blocks is coded as its pieces are."""
    x = np.random.default_rng(0).standard_normal((256, 700)).astype(np.float32)
    whole = quantize(x, Quant(4, 32), "mse", "w")
    left = quantize(np.ascontiguousarray(x[:, :350]), Quant(4, 32), "mse", "w")
    assert (whole["scales"][:, :350] == left["scales"]).all()
    assert (whole["codes"][:, :175] == left["codes"]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(EffcError, match=r"layers\.q: .*NaN or infinity"):
        quantize(np.array([[1.0, bad]], np.float32), Quant(4, 0, axis=-1), "mse", "layers.q")


def test_weights_too_large_for_their_scales_are_refused() -> None:
    with pytest.raises(EffcError, match="w: weights too large for f16 scales, want scale=f32"):
        quantize(np.full((4, 4), 1e6, np.float32), Quant(4, 0, True, "f16"), "absmax", "w")
