"""GPT-2."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from effc.models.attention import ACTIVATIONS, attend, dense, embed


@dataclass(frozen=True)
class Gpt2Config:
    """positions is the length of the learned position table: no sequence can be longer."""

    vocab: int
    positions: int
    width: int
    hidden: int
    heads: int
    layers: int
    eps: float = 1e-5
    act: str = "gelu_new"
    tied: bool = True
    dtype: jnp.dtype = jnp.float32


def norm(c: Gpt2Config, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.eps, dtype=c.dtype, param_dtype=c.dtype, name=name)


class Layer(nn.Module):
    config: Gpt2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        qkv = dense(3 * c.width, True, c.dtype, "qkv")(norm(c, "norm1")(x))
        dim = c.width // c.heads
        q, k, v = (a.reshape(*x.shape[:2], c.heads, dim) for a in jnp.split(qkv, 3, axis=-1))
        x = x + dense(c.width, True, c.dtype, "out")(attend(q, k, v, scale=dim**-0.5))
        h = dense(c.hidden, True, c.dtype, "up")(norm(c, "norm2")(x))
        return x + dense(c.width, True, c.dtype, "down")(ACTIVATIONS[c.act](h))


class Gpt2(nn.Module):
    """tokens i32[B,T] -> logits f32[B,T,V]."""

    config: Gpt2Config

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        table = embed(c.vocab, c.width, c.dtype, "embed")
        positions = embed(c.positions, c.width, c.dtype, "positions")
        x = table(tokens) + positions(jnp.arange(tokens.shape[1])[None])
        for i in range(c.layers):
            x = Layer(c, name=f"layers_{i}")(x)
        x = norm(c, "norm")(x)
        logits = table.attend(x) if c.tied else dense(c.vocab, False, c.dtype, "head")(x)
        return logits.astype(jnp.float32)
