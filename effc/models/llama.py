"""Llama and its relatives: Mistral, Qwen2, Qwen3, SmolLM."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from effc.models.attention import ACTIVATIONS, RMSNorm, attend, dense, embed
from effc.models.rope import Rope


@dataclass(frozen=True)
class LlamaConfig:
    """windows and ropes have one entry a layer: None is full attention, or no position at all (SmolLM3)."""

    vocab: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    eps: float
    act: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def layers(self) -> int:
        return len(self.windows)


class Attention(nn.Module):
    config: LlamaConfig
    window: int | None
    rope: Rope | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def heads_of(name: str, heads: int) -> jax.Array:
            y = dense(heads * c.head_dim, c.qkv_bias, c.dtype, name)(x)
            return y.reshape(*x.shape[:2], heads, c.head_dim)

        q, k, v = heads_of("q", c.heads), heads_of("k", c.kv_heads), heads_of("v", c.kv_heads)
        if c.qk_norm:
            q, k = (RMSNorm(c.eps, dtype=c.dtype, name=f"{n}_norm")(a) for n, a in (("q", q), ("k", k)))
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        mixed = attend(q, k, v, scale=c.head_dim**-0.5, window=self.window)
        return dense(c.width, c.out_bias, c.dtype, "out")(mixed)


class Mlp(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = ACTIVATIONS[c.act](dense(c.hidden, c.mlp_bias, c.dtype, "gate")(x))
        up = dense(c.hidden, c.mlp_bias, c.dtype, "up")(x)
        return dense(c.width, c.mlp_bias, c.dtype, "down")(gate * up)


class Layer(nn.Module):
    config: LlamaConfig
    window: int | None
    rope: Rope | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        h = RMSNorm(c.eps, dtype=c.dtype, name="norm1")(x)
        x = x + Attention(c, self.window, self.rope, name="attn")(h)
        h = RMSNorm(c.eps, dtype=c.dtype, name="norm2")(x)
        return x + Mlp(c, name="mlp")(h)


class Llama(nn.Module):
    """tokens i32[B,T] -> logits f32[B,T,V]."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        table = embed(c.vocab, c.width, c.dtype, "embed")
        x = table(tokens)
        for i, (window, rope) in enumerate(zip(c.windows, c.ropes, strict=True)):
            x = Layer(c, window, rope, name=f"layers_{i}")(x)
        x = RMSNorm(c.eps, dtype=c.dtype, name="norm")(x)
        logits = table.attend(x) if c.tied else dense(c.vocab, False, c.dtype, "head")(x)
        return logits.astype(jnp.float32)
