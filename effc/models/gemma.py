"""Gemma 1, 2 and 3 (text)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from effc.models.attention import ACTIVATIONS, RMSNorm, attend, dense, embed
from effc.models.rope import Rope


@dataclass(frozen=True)
class GemmaConfig:
    """windows and ropes: one entry a layer; scale multiplies q.k; post_norms: one after each branch too."""

    vocab: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    eps: float
    scale: float
    act: str = "gelu_pytorch_tanh"
    bias: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None
    tied: bool = True
    dtype: jnp.dtype = jnp.float32

    @property
    def layers(self) -> int:
        return len(self.windows)


def norm(c: GemmaConfig, name: str) -> RMSNorm:
    return RMSNorm(c.eps, offset=1.0, dtype=c.dtype, name=name)


class Attention(nn.Module):
    config: GemmaConfig
    window: int | None
    rope: Rope

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def heads_of(name: str, heads: int) -> jax.Array:
            y = dense(heads * c.head_dim, c.bias, c.dtype, name)(x)
            return y.reshape(*x.shape[:2], heads, c.head_dim)

        q, k, v = heads_of("q", c.heads), heads_of("k", c.kv_heads), heads_of("v", c.kv_heads)
        if c.qk_norm:
            q, k = norm(c, "q_norm")(q), norm(c, "k_norm")(k)
        q, k = self.rope(q), self.rope(k)
        mixed = attend(q, k, v, scale=c.scale, window=self.window, cap=c.score_cap)
        return dense(c.width, c.bias, c.dtype, "out")(mixed)


class Mlp(nn.Module):
    config: GemmaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = ACTIVATIONS[c.act](dense(c.hidden, False, c.dtype, "gate")(x))
        up = dense(c.hidden, False, c.dtype, "up")(x)
        return dense(c.width, False, c.dtype, "down")(gate * up)


class Layer(nn.Module):
    config: GemmaConfig
    window: int | None
    rope: Rope

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        h = Attention(c, self.window, self.rope, name="attn")(norm(c, "norm1")(x))
        x = x + (norm(c, "post1")(h) if c.post_norms else h)
        h = Mlp(c, name="mlp")(norm(c, "norm2")(x))
        return x + (norm(c, "post2")(h) if c.post_norms else h)


class Gemma(nn.Module):
    """tokens i32[B,T] -> logits f32[B,T,V]."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        table = embed(c.vocab, c.width, c.dtype, "embed")
        x = table(tokens) * jnp.asarray(c.width**0.5, c.dtype)
        for i, (window, rope) in enumerate(zip(c.windows, c.ropes, strict=True)):
            x = Layer(c, window, rope, name=f"layers_{i}")(x)
        x = norm(c, "norm")(x)
        logits = table.attend(x) if c.tied else dense(c.vocab, False, c.dtype, "head")(x)
        logits = logits.astype(jnp.float32)
        return logits if c.logit_cap is None else jnp.tanh(logits / c.logit_cap) * c.logit_cap
