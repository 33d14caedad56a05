"""What the attention kernel computes, in plain JAX: each row of keys in f32, all scores at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, scales: tuple[jax.Array, jax.Array] | None,
    positions: jax.Array, sinks: jax.Array | None = None, *,
    scale: float = 1.0, window: int = 0, softcap: float = 0.0,
) -> jax.Array:  # fmt: skip
    """[b,t,h,d] of q[b,t,h,d] over keys and values [b*g,S,d], each row times its scale of f32[b,g,S] where given.

    Key j is seen by query i where positions[b,i] - window < j <= positions[b,i]; window 0 sees all before.
    sinks[h] are in the softmax as one score more, of no key.
    """
    b, t, h, d = q.shape
    S = keys.shape[1]
    k, v = (_wide(x, None if scales is None else scales[n], b) for n, x in enumerate((keys, values)))
    grouped = q.astype(jnp.float32).reshape(b, t, k.shape[1], -1, d)
    scores = jnp.einsum("btgrd,bgsd->bgtrs", grouped, k, precision="highest") * scale
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    key, query = jnp.arange(S)[None, None], positions[:, :, None]
    seen = (key <= query) & ((key > query - window) if window else True)
    scores = jnp.where(seen[:, None, :, None], scores, -jnp.inf)
    most = scores.max(axis=-1, keepdims=True)
    beside = None if sinks is None else sinks.astype(jnp.float32).reshape(1, k.shape[1], 1, -1, 1)
    most = most if beside is None else jnp.maximum(most, beside)
    weights = jnp.exp(scores - most)
    total = weights.sum(axis=-1, keepdims=True) + (0 if beside is None else jnp.exp(beside - most))
    out = jnp.einsum("bgtrs,bgsd->btgrd", weights / total, v, precision="highest")
    return out.reshape(b, t, h, d).astype(q.dtype)


def _wide(x: jax.Array, scale: jax.Array | None, batch: int) -> jax.Array:
    """f32[b,g,S,d]."""
    wide = x.astype(jnp.float32).reshape(batch, -1, *x.shape[1:])
    return wide if scale is None else wide * scale[..., None]
