"""The parts every family shares: norm, masked attention, activations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis in float32, times scale + offset (Gemma stores scale - 1)."""

    eps: float
    offset: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],), self.dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32)
        if self.offset:
            scale = scale + self.offset
        return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


def dense(features: int, bias: bool, dtype: jnp.dtype, name: str) -> nn.Dense:
    """kernel [in,out], stored and computed in dtype."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, param_dtype=dtype, name=name)


def embed(rows: int, features: int, dtype: jnp.dtype, name: str) -> nn.Embed:
    return nn.Embed(rows, features, dtype=dtype, param_dtype=dtype, name=name)


def causal_mask(length: int, window: int | None) -> jax.Array:
    """[T,T], true where the key is not later than the query and fewer than window positions before it."""
    query = jax.lax.broadcasted_iota(jnp.int32, (length, length), 0)
    key = jax.lax.broadcasted_iota(jnp.int32, (length, length), 1)
    mask = key <= query
    return mask if window is None else mask & (query - key < window)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """q [B,T,H,D], k and v [B,T,K,D], H a multiple of K -> [B,T,H*D]; cap bends scores into (-cap, cap)."""
    batch, length, heads, dim = q.shape
    k, v = (jnp.repeat(a, heads // k.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * scale
    if cap is not None:
        scores = jnp.tanh(scores / cap) * cap
    mask = causal_mask(length, window)[None, None]
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, heads * dim)
