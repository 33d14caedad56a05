"""Products with floats in native regions: close to exact sums, the same whatever the rows and threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.runtime import layers
from effc.runtime.kernels.build import Unbuilt
from effc.runtime.kernels.region import native
from effc.runtime.kernels.region.steps import COLUMNS, ROWS

try:
    native.target(())
except Unbuilt as unbuilt:
    pytest.skip(f"native kernels: {unbuilt}", allow_module_level=True)

VARIANTS = [(), *native.VARIANTS.values()]


def numbers(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def product(x: jax.Array, w: jax.Array, bias: jax.Array | None, layout: str, flags: tuple[str, ...] = ()) -> Any:
    """x times w as a program with regions: what runs, which a test may look at before it runs it."""
    call = native.regions(partial(layers.linear, layout=layout), flags)
    return jax.jit(call).lower(*((x, w) if bias is None else (x, w, bias)))


def ran(x: jax.Array, w: jax.Array, bias: jax.Array | None, layout: str, flags: tuple[str, ...] = ()) -> np.ndarray:
    lowered = product(x, w, bias, layout, flags)
    assert "effc_region" in lowered.as_text()
    return np.asarray(lowered.compile()(*((x, w) if bias is None else (x, w, bias))))


@pytest.mark.parametrize("flags", VARIANTS, ids=["native", *native.VARIANTS])
@given(
    inner=st.sampled_from([1, 7, 15, 16, 17, 33, 100, 192]),
    outer=st.sampled_from([9, 15, 16, 17, 31, 33, 63, 64, 97, 255, 256, 300, 1024, 1100, 2049]),
    rows=st.integers(1, ROWS), layout=st.sampled_from(["kn", "nk"]), biased=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(deadline=None, max_examples=6)
def test_sums_are_close_to_exact(
    flags: tuple[str, ...], inner: int, outer: int, rows: int, layout: str, biased: bool, dtype: str, seed: int
) -> None:
    x, bias = numbers(seed, rows, inner), numbers(seed + 1, outer) if biased else None
    w = numbers(seed + 2, *((inner, outer) if layout == "kn" else (outer, inner))).astype(dtype)
    wide = np.asarray(w.astype(jnp.float32), np.float64)
    wide = wide if layout == "kn" else wide.T
    exact, most = np.asarray(x, np.float64) @ wide, np.abs(np.asarray(x, np.float64)) @ np.abs(wide)
    exact, most = (exact, most) if bias is None else (exact + np.asarray(bias), most + np.abs(np.asarray(bias)))
    # Each of the inner + 1 additions rounds by half a unit of what is summed so far.
    assert (np.abs(ran(x, w, bias, layout, flags) - exact) <= (inner + 1) * 2.0**-24 * most).all()


@pytest.mark.parametrize("layout", ["kn", "nk"])
@pytest.mark.parametrize("outer", [40, 200, 1100])
def test_a_row_does_not_depend_on_the_others(layout: str, outer: int) -> None:
    x, w = numbers(0, ROWS, 100), numbers(1, *((100, outer) if layout == "kn" else (outer, 100)))
    alone = ran(x[:1], w, None, layout)
    for count in range(2, ROWS + 1):
        assert (ran(x[:count], w, None, layout)[:1] == alone).all(), count


@pytest.mark.parametrize("layout", ["kn", "nk"])
def test_infinities_and_what_is_no_number_stay(layout: str) -> None:
    x, w = numbers(0, 3, 20), numbers(1, *((20, 40) if layout == "kn" else (40, 20)))
    y = ran(x.at[0, 3].set(jnp.inf).at[1, 19].set(jnp.nan), w, None, layout)
    assert np.isinf(y[0]).all() and np.isnan(y[1]).all() and np.isfinite(y[2]).all()


def test_many_rows_and_few_columns_stay_with_xla() -> None:
    few, wide = numbers(0, 4, COLUMNS), numbers(0, 4, COLUMNS + 1)
    assert "effc_region" not in product(numbers(1, 1, 4), few, None, "kn").as_text()
    assert "effc_region" in product(numbers(1, ROWS, 4), wide, None, "kn").as_text()
    assert "effc_region" not in product(numbers(1, ROWS + 1, 4), wide, None, "kn").as_text()


def test_the_environment_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFC_NATIVE", "0")
    assert "effc_region" not in product(numbers(1, 1, 4), numbers(0, 4, 64), None, "kn").as_text()
