"""Small language models as users write them, one function each: (module, parameters) or an NNX module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

VOCAB, WIDTH, HEADS, HEAD = 61, 32, 4, 8


def causal(t: int, window: int = 0) -> jax.Array:
    """bool[1,1,t,t]"""
    i, j = jnp.arange(t)[:, None], jnp.arange(t)[None]
    seen = (j <= i) & (j > i - window) if window else j <= i
    return seen[None, None]


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Half-split rotary of x[b,t,h,d] at positions[t]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** (-jnp.arange(half) / half)[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    """Pre-norm grouped-query attention and SwiGLU; `window` limits the keys, after the softmax where it is `late`."""

    window: int = 0
    sink: bool = False
    late: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        b, t, _w = x.shape
        h = nn.RMSNorm(name="norm1")(x)
        q = nn.Dense(HEADS * HEAD, use_bias=False, name="q")(h).reshape(b, t, HEADS, HEAD)
        k, v = (nn.Dense(2 * HEAD, use_bias=True, name=n)(h).reshape(b, t, 2, HEAD) for n in "kv")
        q, k = rotate(q, jnp.arange(t)), rotate(k, jnp.arange(t))
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
        scores = jnp.where(causal(t, 0 if self.late else self.window), scores, -1e9)
        if self.sink:
            extra = jnp.broadcast_to(
                self.param("sink", nn.initializers.ones, (HEADS,))[None, :, None, None], (b, HEADS, t, 1)
            )
            weights = nn.softmax(jnp.concatenate([scores, extra], -1))[..., :-1]
        else:
            weights = nn.softmax(scores)
        if self.late:
            weights = jnp.where(causal(t, self.window), weights, 0)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, HEADS * HEAD)
        x = x + nn.Dense(WIDTH, use_bias=False, name="o")(mixed)
        h = nn.RMSNorm(name="norm2")(x)
        h = nn.silu(nn.Dense(48, use_bias=False, name="gate")(h)) * nn.Dense(48, use_bias=False, name="up")(h)
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(h), None


class Decoder(nn.Module):
    """Layers unrolled or scanned; `windows` gives each unrolled layer its window."""

    windows: tuple[int, ...] = (0, 0, 0)
    scan: bool = False
    sink: bool = False
    late: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        x = embed(tokens)
        if self.scan:
            stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(name="layers")(x, None)
        else:
            for i, window in enumerate(self.windows):
                x, _ = Layer(window, self.sink, self.late, name=f"layers_{i}")(x)
        return embed.attend(nn.RMSNorm(name="norm")(x))


class Alibi(nn.Module):
    """Linear biases, LayerNorm, one fused projection on [b*h,t,d], an untied head."""

    @nn.compact
    def __call__(self, tokens):
        b, t = tokens.shape
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        slopes = 2.0 ** (-8 * jnp.arange(1, HEADS + 1) / HEADS)
        far = (jnp.arange(t)[None] - jnp.arange(t)[:, None]).astype(jnp.float32)
        bias = jnp.where(causal(t)[0], slopes[:, None, None] * far[None], -jnp.inf)
        for _ in range(2):
            qkv = nn.Dense(3 * WIDTH)(nn.LayerNorm()(x)).reshape(b, t, 3, HEADS, HEAD)
            q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3).reshape(b * HEADS, t, HEAD) for i in range(3))
            scores = (q @ k.transpose(0, 2, 1)).reshape(b, HEADS, t, t) * HEAD**-0.5 + bias[None]
            mixed = nn.softmax(scores).reshape(b * HEADS, t, t) @ v
            x = x + nn.Dense(WIDTH)(mixed.reshape(b, HEADS, t, HEAD).transpose(0, 2, 1, 3).reshape(b, t, WIDTH))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)), approximate=False))
        return nn.Dense(VOCAB)(nn.LayerNorm()(x))


class NnxLayer(nnx.Module):
    """Learned positions live in the model; attention by jax.nn.dot_product_attention."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.LinearGeneral(WIDTH, (3, HEADS, HEAD), rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, HEAD), WIDTH, axis=(-2, -1), rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 64, rngs=rngs), nnx.Linear(64, WIDTH, rngs=rngs)

    def __call__(self, x):
        qkv = self.qkv(self.norm1(x))
        q, k, v = (qkv[:, :, i] for i in range(3))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.places = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Embed(40, WIDTH, rngs=rngs)
        self.layers = nnx.List([NnxLayer(rngs) for _ in range(3)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.places(jnp.arange(tokens.shape[1]))[None]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """Sees later tokens: not a language model."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        x = x + nn.SelfAttention(HEADS, deterministic=True)(x)
        return nn.Dense(VOCAB)(x)


class LastOnly(nn.Module):
    """Logits of one position."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(VOCAB)(nn.Embed(VOCAB, WIDTH)(tokens))[:, -1]


def initialised(module: nn.Module) -> tuple[nn.Module, Any]:
    """The module with random parameters, biases and scales moved off their start."""
    params = module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return module, jax.tree.unflatten(tree, moved)


MODELS: dict[str, Callable[[], Any]] = {
    "unrolled": lambda: initialised(Decoder()),
    "scanned": lambda: initialised(Decoder(scan=True)),
    "alternating": lambda: initialised(Decoder(windows=(6, 0, 6, 0))),
    "alibi": lambda: initialised(Alibi()),
    "nnx": lambda: (NnxModel(nnx.Rngs(0)), None),
    "sink": lambda: initialised(Decoder(sink=True, windows=(0, 0))),
    "late": lambda: initialised(Decoder(late=True, windows=(4,))),
}
