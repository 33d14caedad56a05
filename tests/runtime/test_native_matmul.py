"""The native kernel against the arrays that the codes stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax

from effc.runtime import layers, quantized
from effc.runtime.kernels.build import Unbuilt, find_compiler
from effc.runtime.kernels.matmul import native
from effc.runtime.qarray import QArray, pack

try:
    COMPILER = find_compiler()
except Unbuilt as error:
    pytest.skip(f"native kernels: {error}", allow_module_level=True)

PORTABLE = ("-DEFFC_PORTABLE",)
TYPES = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32}


@st.composite
def products(draw: st.DrawFn) -> tuple[jax.Array, QArray, str]:
    """x[R,K], a quantized matrix, its layout. Sizes lie about those of vectors, bytes, threads' shares."""
    layout, bits = draw(st.sampled_from(["kn", "nk"])), draw(st.sampled_from([2, 3, 4, 5, 8]))
    near = st.sampled_from([1, 2, 15, 16, 31, 32, 33, 64, 127, 129, 160, 191, 320, 577])
    rows, extent, outputs = draw(st.integers(1, 9)), draw(near), draw(near)
    group, sym = draw(st.sampled_from([0, 1, 5, 16, 32, 48, 64])), draw(st.booleans())
    dtype = TYPES[draw(st.sampled_from(sorted(TYPES)))]
    return make(draw(st.integers(0, 2**32 - 1)), layout, bits, rows, extent, outputs, group, sym, dtype)


def make(
    seed: int, layout: str, bits: int, rows: int, extent: int, outputs: int, group: int = 32, sym: bool = True,
    dtype: jnp.dtype | type = jnp.float16,
) -> tuple[jax.Array, QArray, str]:  # fmt: skip
    rng = np.random.default_rng(seed)
    axis, shape = (-2, (extent, outputs)) if layout == "kn" else (-1, (outputs, extent))
    grouped = list(shape)
    grouped[axis] = -(-extent // (group or extent))
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
    scales = jnp.asarray(rng.uniform(-2.0, 2.0, grouped), dtype)
    zeros = None if sym else jnp.asarray(rng.uniform(-3, 3, grouped), dtype)
    stored = jnp.asarray(pack(codes) if bits <= 4 else codes)
    x = jnp.asarray(rng.standard_normal((rows, extent)), jnp.float32)
    return x, QArray(stored, scales, zeros, bits, group, axis, shape[1]), layout


def exact(x: jax.Array, w: QArray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """The product in f64, and the sum of its terms' sizes."""
    wide, values = np.asarray(x, np.float64), np.asarray(w.dequantize(), np.float64)
    values = values if layout == "kn" else values.T
    return wide @ values, np.abs(wide) @ np.abs(values)


def check(x: jax.Array, w: QArray, layout: str, *flags: str) -> None:
    want, size = exact(x, w, layout)
    got = np.asarray(native.matmul(x, w, layout, flags=flags))
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.all(np.abs(got - want) <= 2e-6 * size + 1e-30)


@given(products())
@settings(deadline=None, max_examples=30)
def test_kernel(product: tuple[jax.Array, QArray, str]) -> None:
    check(*product)


@given(products())
@settings(deadline=None, max_examples=20)
def test_plain_loops(product: tuple[jax.Array, QArray, str]) -> None:
    check(*product, *PORTABLE)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["kn", "nk"])
def test_large_enough_for_threads(layout: str, bits: int) -> None:
    check(*make(0, layout, bits, 3, 512, 20000))


@pytest.mark.parametrize("flags", [(), PORTABLE])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["kn", "nk"])
def test_what_is_not_finite(layout: str, value: float, flags: tuple[str, ...]) -> None:
    x, w, _ = make(1, layout, 4, 3, 96, 70, sym=False)
    x = x.at[1, 40].set(value)
    got = np.asarray(native.matmul(x, w, layout, flags=flags))
    want = np.asarray(x @ (w.dequantize() if layout == "kn" else w.dequantize().T))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[[0, 2]], want[[0, 2]], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("flags", [(), PORTABLE])
@pytest.mark.parametrize("layout", ["kn", "nk"])
def test_groups_of_zero_and_of_nan(layout: str, flags: tuple[str, ...]) -> None:
    x, w, _ = make(2, layout, 4, 2, 64, 66)
    scales = w.scales.at[:, 3].set(jnp.nan) if layout == "kn" else w.scales.at[3].set(jnp.nan)
    got = np.asarray(native.matmul(x, replace(w, scales=jnp.where(jnp.isnan(scales), scales, 0)), layout, flags=flags))
    assert np.isnan(got[:, 3]).all() and (np.delete(got, 3, axis=1) == 0).all()


@pytest.mark.parametrize("layout", ["kn", "nk"])
def test_linear_calls_it(layout: str) -> None:
    x, w, _ = make(3, layout, 4, 5, 64, 48)
    call = jax.jit(lambda x, w: layers.linear(x, w, layout=layout))
    assert "effc_matmul" in call.lower(x, w).as_text()
    assert "effc_matmul" not in call.lower(jnp.zeros((native.FEW + 1, 64)), w).as_text()
    half = call(x.astype(jnp.bfloat16), w)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), call(x, w), rtol=0.05, atol=1.0)


def test_inside_a_loop() -> None:
    x, w, _ = make(4, "kn", 8, 1, 64, 64)
    w = replace(w, scales=w.scales / 256)
    step = jax.jit(lambda x: lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, layers.linear(c[1], w)), (0, x)))
    want = x
    for _ in range(5):
        want = want @ w.dequantize()
    np.testing.assert_allclose(step(x)[1], want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


def test_mapped() -> None:
    x, w, _ = make(5, "kn", 4, 6, 64, 40)
    got = jax.vmap(lambda row: quantized.matmul(row[None], w, "kn")[0])(x)
    np.testing.assert_allclose(got, native.matmul(x, w, "kn"), rtol=1e-5, atol=1e-4)


def test_portable_programs_lower_for_any_machine() -> None:
    x, w, _ = make(6, "kn", 4, 1, 64, 40)

    def call(x: jax.Array, codes: jax.Array) -> jax.Array:
        with native.portable():
            return quantized.matmul(x, replace(w, codes=codes), "kn")

    text = export.export(jax.jit(call), platforms=("cpu", "tpu"))(x, w.codes).mlir_module()
    assert "effc_matmul" not in text
    np.testing.assert_allclose(jax.jit(call)(x, w.codes), native.matmul(x, w, "kn"), rtol=1e-4, atol=1e-3)


PROGRAM = """
import jax.numpy as jnp
from effc.runtime import quantized
from effc.runtime.kernels.matmul import native
from effc.runtime.kernels.region import native as region
from effc.runtime.qarray import QArray
region.usable()
w = QArray(jnp.full((8, 4), 0x21, jnp.uint8), jnp.ones((1, 8)), None, 4, 0, -2, 8)
for _ in range(2):
    print(quantized.matmul(jnp.ones((1, 8)), w, "kn")[0].tolist())
print(native.status())
"""


def run(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == [str([8.0, 16.0] * 4)] * 2
    return done


def test_without_a_compiler_xla_runs_and_says_so_once(tmp_path: Path) -> None:
    done = run(tmp_path, CXX="no-such-compiler")
    assert done.stderr.count("no C++ compiler (no-such-compiler)") == 1
    assert done.stdout.splitlines()[2] == "not built: no C++ compiler (no-such-compiler)"


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run(tmp_path, CXX=str(compiler))
    assert "fails: error: out of order" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_turned_off(tmp_path: Path) -> None:
    done = run(tmp_path, EFFC_NATIVE="0", CXX="no-such-compiler")
    assert done.stdout.splitlines()[2] == "off (EFFC_NATIVE=0)" and "effc" not in done.stderr
