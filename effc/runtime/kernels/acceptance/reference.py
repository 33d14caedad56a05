"""What the acceptance kernel computes, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from effc.runtime.speculate import residual


def draw(p: jax.Array, q: jax.Array, bits: jax.Array) -> jax.Array:
    """i32[R]: a token of norm(max(0, p - q)) for rows of p, q f32[R,V], drawn with the threefry keys u32[R,2].

    Of p itself where nothing is left.
    """
    keys = jax.random.wrap_key_data(bits, impl="threefry2x32")
    return jax.vmap(jax.random.categorical)(keys, jnp.log(residual(p, q))).astype(jnp.int32)
