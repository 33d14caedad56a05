"""What quantized products mean, in plain jnp: x @ ((codes - zeros) * scales), and what rounding x to digits leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from effc.runtime.qarray import QArray


def matmul(x: jax.Array, w: QArray, layout: str = "kn") -> jax.Array:
    """f32[R,N] from x[R,K] and w[K,N] (layout nk: w[N,K])."""
    dense = w.dequantize()
    return jnp.matmul(x.astype(jnp.float32), dense if layout == "kn" else dense.T, precision="highest")


def rounded(x: jax.Array, digits: int) -> jax.Array:
    """Each row in 127 * 128 steps to its greatest magnitude, or, with one digit, 127."""
    wide = x.astype(jnp.float32)
    t = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / (127 * 128 if digits == 2 else 127)
    inverse = 1 / jnp.where(t == 0, 1, t)
    return jnp.round(wide * inverse) * t
