"""Values, or gradients, rounded as codes would be."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from effc.runtime.kernels.region.record import recorded


@recorded
def fake_quant(
    x: jax.Array, scale: jax.Array | None = None, *, bits: int, group: int = 0,
    of: Literal["value", "gradient"] = "value",
) -> jax.Array:  # fmt: skip
    """x as the nearest of 2^bits codes times scale[1], or a scale a row of the last axis, or for each `group` of its
    places (fewer at the end); gradients pass through.

    A row's own scale puts its greatest magnitude half a step past the last code, as codes of weights have it.
    Of a gradient: x as it is, what comes back is rounded, up or down at random by nearness (its mean stays).
    """
    if of == "gradient":
        return _rounding_gradient(x, bits)
    wide = x.astype(jnp.float32)
    rounded = _grouped(wide, bits, group) if group else _rounded(wide, scale, bits)
    return through(rounded, wide).astype(x.dtype)


def _grouped(x: jax.Array, bits: int, group: int) -> jax.Array:
    *outer, width = x.shape
    padded = jnp.pad(x, [(0, 0)] * len(outer) + [(0, -width % group)])
    return _rounded(padded.reshape(*outer, -1, group), None, bits).reshape(*outer, -1)[..., :width]


def _rounded(x: jax.Array, scale: jax.Array | None, bits: int, noise: jax.Array | float = 0.0) -> jax.Array:
    most = (1 << bits - 1) - 1
    if scale is None:
        reach = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / (most + 0.5)
        scale = jnp.where(reach > 0, reach, 1.0)
    scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return jnp.clip(jnp.round(x / scale + noise), -most, most) * scale


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounding_gradient(x: jax.Array, bits: int) -> jax.Array:
    return x


def _kept_nothing(x: jax.Array, bits: int) -> tuple[jax.Array, None]:
    return x, None


def _came_back(bits: int, kept: None, gradient: jax.Array) -> tuple[jax.Array]:
    """Draws follow from the gradient itself: other ones at every step, the same when it is run again."""
    wide = gradient.astype(jnp.float32)
    key = jax.random.key(lax.bitcast_convert_type(jnp.sum(wide), jnp.uint32))
    noise = jax.random.uniform(key, wide.shape, minval=-0.5, maxval=0.5)
    return (_rounded(wide, None, bits, noise).astype(gradient.dtype),)


_rounding_gradient.defvjp(_kept_nothing, _came_back)


@jax.custom_jvp
def through(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, with the gradient of `like`."""
    return value


@through.defjvp
def _like(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]
