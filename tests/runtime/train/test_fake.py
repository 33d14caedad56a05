"""Fake quantization: what losses see is what is stored; gradients reach codes and scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.ir.types import Quant
from effc.passes.quantizer import quantize
from effc.runtime.forms import held
from effc.runtime.qarray import QArray
from effc.runtime.train import fake

X = np.random.default_rng(0).standard_normal((24, 6)).astype(np.float32)


def coded(quant: Quant) -> QArray:
    parts = quantize(X, quant, "mse", "w")
    zeros = jnp.asarray(parts["zeros"]) if "zeros" in parts else None
    codes = jnp.asarray(held(parts["codes"], 6, quant.bits))
    return QArray(codes, jnp.asarray(parts["scales"]), zeros, quant.bits, quant.group, quant.axis, 6)


@pytest.mark.parametrize("quant", [Quant(4, 8, scale="f16"), Quant(3, 8, sym=False), Quant(8, 0, axis=-1), Quant(5, 7)])
def test_it_begins_at_what_is_coded(quant: Quant) -> None:
    tree = {"a": [{"w": coded(quant)}], "b": jnp.ones(3)}
    told = fake.forms(tree)
    out = fake.faked(told, fake.loose(tree))
    np.testing.assert_array_equal(out["a"][0]["w"], tree["a"][0]["w"].dequantize())
    np.testing.assert_array_equal(out["b"], tree["b"])


def test_what_is_seen_is_what_is_stored_after_steps() -> None:
    q = coded(Quant(4, 8, scale="f16"))
    told, rng = fake.forms(q), np.random.default_rng(1)
    parts = fake.loose(q)
    parts["steps"] += jnp.asarray(rng.normal(0, 3, X.shape), jnp.float32)
    parts["stretch"] += 0.3
    codes, scales = fake.codes(told, parts), fake.scales(told, parts)
    assert float(codes.min()) >= -8 and float(codes.max()) <= 7
    assert bool(jnp.all(codes == jnp.round(codes))) and bool(jnp.all(scales.astype(jnp.float16) == scales))
    again = np.repeat(np.asarray(scales), 8, 0) * np.asarray(codes)
    np.testing.assert_array_equal(fake.faked(told, parts), again)


def test_gradients_go_through_rounding_and_stop_at_the_ends() -> None:
    q = coded(Quant(4, 8))
    told, parts = fake.forms(q), fake.loose(q)
    parts["steps"] = parts["steps"].at[0, 0].set(9.0)
    grads = jax.grad(lambda steps: jnp.sum(fake.faked(told, {**parts, "steps": steps})))(parts["steps"])
    assert float(grads[0, 0]) == 0
    np.testing.assert_allclose(grads[8:], np.repeat(np.asarray(parts["scale"]), 8, 0)[8:], rtol=1e-6)
    moved = jax.grad(lambda s: jnp.sum(jnp.square(fake.faked(told, {**parts, "stretch": s}))))(parts["stretch"])
    assert bool(jnp.all(moved > 0))


def test_stochastic_rounding_is_right_on_the_average() -> None:
    q = coded(Quant(4, 8))
    told, parts = fake.forms(q), fake.loose(q)
    parts["steps"] = jnp.full(X.shape, 1.25)
    drawn = [fake.codes(told, parts, jax.random.key(i)) for i in range(60)]
    assert set(np.unique(drawn)) == {1.0, 2.0}
    assert abs(float(np.mean(drawn)) - 1.25) < 0.02


def test_only_codes_scales_and_dense_arrays_learn() -> None:
    tree = {"a": coded(Quant(4, 8, sym=False)), "b": jnp.ones(3)}
    told = fake.forms(tree)
    parts = {"scale": False, "steps": True, "stretch": True, "zero": False}
    assert fake.trainable(told) == {"a": parts, "b": True}
    assert fake.trainable(told, dense=False) == {"a": parts, "b": False}
