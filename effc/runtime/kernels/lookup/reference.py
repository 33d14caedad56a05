"""What the lookup kernel computes, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rows(codes: jax.Array, ids: jax.Array) -> jax.Array:
    """f32[n,D] of codes[V,D] at ids[n], which must be in 0..V-1."""
    return jnp.take(codes, ids, axis=0).astype(jnp.float32)
