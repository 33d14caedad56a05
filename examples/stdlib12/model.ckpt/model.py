"""A small decoder-only language model in Flax Linen: the usual modern parts, no cache, no dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * scale[None, None, :]


def rotate(x, theta):
    """Rotary positions, half-split: x [B,T,H,D] pairs dimension i with i + D/2."""
    length, half = x.shape[1], x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    """Causal attention with grouped queries: each key/value head serves heads // kv_heads query heads."""

    heads: int
    kv_heads: int
    head_dim: int
    theta: float

    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape

        def project(name, heads):
            y = nn.Dense(heads * self.head_dim, use_bias=False, name=name)(x)
            return y.reshape(batch, length, heads, self.head_dim)

        q = rotate(project("q", self.heads), self.theta).transpose(0, 2, 1, 3)
        k = rotate(project("k", self.kv_heads), self.theta).transpose(0, 2, 1, 3)
        v = project("v", self.kv_heads).transpose(0, 2, 1, 3)
        k, v = (jnp.repeat(y, self.heads // self.kv_heads, axis=1) for y in (k, v))
        scores = (q * self.head_dim**-0.5) @ k.swapaxes(-1, -2)
        causal = jnp.tril(jnp.ones((length, length), dtype=bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
        mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, length, self.heads * self.head_dim)
        return nn.Dense(width, use_bias=False, name="o")(mixed)


class SwiGLU(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        gate = nn.Dense(self.hidden, use_bias=False, name="gate")(x)
        up = nn.Dense(self.hidden, use_bias=False, name="up")(x)
        return nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.silu(gate) * up)


class Layer(nn.Module):
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    theta: float
    eps: float

    @nn.compact
    def __call__(self, x):
        attention = Attention(self.heads, self.kv_heads, self.head_dim, self.theta, name="attn")
        x = x + attention(RMSNorm(self.eps, name="norm1")(x))
        return x + SwiGLU(self.hidden, name="mlp")(RMSNorm(self.eps, name="norm2")(x))


class Decoder(nn.Module):
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    theta: float = 10000.0
    eps: float = 1e-5

    @nn.compact
    def __call__(self, tokens):
        """tokens i32[B,T] -> logits f32[B,T,vocab]."""
        embed = nn.Embed(self.vocab, self.width, embedding_init=nn.initializers.normal(0.02), name="embed")
        x = embed(tokens)
        for i in range(self.layers):
            x = Layer(
                self.heads,
                self.kv_heads,
                self.head_dim,
                self.hidden,
                self.theta,
                self.eps,
                name=f"layers_{i}",
            )(x)
        x = RMSNorm(self.eps, name="norm")(x)
        return embed.attend(x).astype(jnp.float32)


def build(**config) -> nn.Module:
    return Decoder(**config)
