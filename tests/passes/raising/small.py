"""One small decoder whose rotary, bias and embedding are written in the ways that programs elsewhere write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import effc
from effc.frontend.source import Source

VOCAB, WIDTH, HEADS, HEAD, CONTEXT = 97, 32, 4, 8, 40

Turn = Callable[[jax.Array], jax.Array]
"""x[b,t,h,d] turned by its position."""

Embed = Callable[[Any, jax.Array], jax.Array]
"""Parameters and tokens -> [b,t,32]."""

Bias = Callable[[Any, int], jax.Array]
"""A layer's parameters and the length -> what is added to scores [h,t,t]."""


def angles(t: int, width: int, xp: Any = jnp) -> Any:
    """[t, width / 2], by jax.numpy or numpy."""
    return xp.arange(t)[:, None] * 10000.0 ** (-xp.arange(width // 2) * 2 / width)[None]


def unturned(x: jax.Array) -> jax.Array:
    return x


def by_scatter(x: jax.Array) -> jax.Array:
    """Even and odd columns written into an empty array, heads before tokens."""
    y, at = x.transpose(0, 2, 1, 3), angles(x.shape[1], x.shape[-1])[None, None]
    even, odd, cos, sin = y[..., 0::2], y[..., 1::2], jnp.cos(at), jnp.sin(at)
    out = jnp.zeros_like(y).at[..., 0::2].set(even * cos - odd * sin)
    return out.at[..., 1::2].set(even * sin + odd * cos).transpose(0, 2, 1, 3)


def by_complex(x: jax.Array) -> jax.Array:
    """Pairs as complex numbers, times rows of a table of e^(i angle)."""
    table = np.exp(1j * angles(CONTEXT, x.shape[-1], np)).astype(np.complex64)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    out = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * jnp.asarray(table)[: x.shape[1]][None, :, None]
    return jnp.stack([out.real, out.imag], -1).reshape(x.shape)


def by_exponential(x: jax.Array) -> jax.Array:
    """The same without a table: half-split, (a + ib) e^(i angle)."""
    a, b = jnp.split(x, 2, axis=-1)
    out = (a + 1j * b) * jnp.exp(1j * angles(x.shape[1], x.shape[-1]))[None, :, None]
    return jnp.concatenate([jnp.real(out), jnp.imag(out)], -1)


def looked_up(p: Any, tokens: jax.Array) -> jax.Array:
    return p["embed"][tokens]


def one_hot(p: Any, tokens: jax.Array) -> jax.Array:
    return jax.nn.one_hot(tokens, VOCAB) @ p["embed"]


def sinusoids(p: Any, tokens: jax.Array) -> jax.Array:
    """Rows of a fixed table [1, length, width] are added."""
    at = angles(CONTEXT, WIDTH, np)
    table = jnp.asarray(np.concatenate([np.sin(at), np.cos(at)], -1, dtype=np.float32))[None]
    return p["embed"][tokens] + table[:, : tokens.shape[1]]


def unbiased(p: Any, t: int) -> jax.Array:
    return jnp.zeros((1, 1, 1))


def buckets(t: int) -> jax.Array:
    """How far back a key is, in eight steps that grow."""
    back = jnp.maximum(jnp.arange(t)[:, None] - jnp.arange(t)[None], 0)
    return jnp.minimum(jnp.floor(jnp.log2(back + 1.0)).astype(jnp.int32), 7)


def relative(p: Any, t: int) -> jax.Array:
    """A number a head for each distance, learned."""
    return p["bias"][buckets(t)].transpose(2, 0, 1)


def relative_one_hot(p: Any, t: int) -> jax.Array:
    """The same as a product with one-hot vectors."""
    return jnp.einsum("nh,nij->hij", p["bias"], (jnp.arange(8)[:, None, None] == buckets(t)[None]).astype(jnp.float32))


def curved(p: Any, t: int) -> jax.Array:
    """A fixed bias that is no straight line."""
    back = jnp.maximum(jnp.arange(t)[:, None] - jnp.arange(t)[None], 0)
    return -jnp.log1p(back)[None] * jnp.arange(1, HEADS + 1)[:, None, None]


def earlier(p: Any, tokens: jax.Array, h: jax.Array, scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)


def padded(p: Any, tokens: jax.Array, h: jax.Array, scores: jax.Array) -> jax.Array:
    """Tokens below 9 are seen by nobody but themselves; masks are multiplied."""
    t = tokens.shape[1]
    own, valid = jnp.eye(t), (tokens > 8).astype(jnp.float32)[:, None, None, :]
    return jnp.where(jnp.tril(jnp.ones((t, t))) * jnp.maximum(valid, own) > 0, scores, jnp.finfo(jnp.float32).min)


def blinded(p: Any, tokens: jax.Array, h: jax.Array, scores: jax.Array) -> jax.Array:
    """Token 0 is seen by nobody and sees nobody; a number is added."""
    t = tokens.shape[1]
    valid = (tokens != 0).astype(jnp.float32)
    mask = (valid[:, None, :, None] * valid[:, None, None, :]) * jnp.tril(jnp.ones((t, t)))
    return scores + jax.lax.select(mask > 0, jnp.zeros_like(mask), jnp.full_like(mask, -1e10))


def packed(p: Any, tokens: jax.Array, h: jax.Array, scores: jax.Array) -> jax.Array:
    """Texts end with a token below 9; tokens see those of their own text."""
    text = jnp.cumsum(tokens < 9, axis=1)
    same = (text[:, None] == text[:, :, None])[:, None]
    return jnp.where(same & jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)


def forgetful(p: Any, tokens: jax.Array, h: jax.Array, scores: jax.Array) -> jax.Array:
    """Each token fades what came before it, by as much as its state says, head by head."""
    fade = jnp.cumsum(jax.nn.log_sigmoid(jnp.dot(h, p["fade"]) + 2.0), axis=1).transpose(0, 2, 1)
    return earlier(p, tokens, h, scores + fade[..., :, None] - fade[..., None, :])


def far_seen(p: Any, tokens: jax.Array, h: jax.Array, scores: jax.Array) -> jax.Array:
    """The last six are seen, and from anywhere later tokens below 9."""
    i, j = jnp.arange(tokens.shape[1])[:, None], jnp.arange(tokens.shape[1])[None]
    seen = ((j > i - 6) | (tokens < 9)[:, None, :]) & (j <= i)
    return jnp.where(seen[:, None], scores, -1e9)


def ahead(p: Any, tokens: jax.Array, h: jax.Array, scores: jax.Array) -> jax.Array:
    """Not causal: tokens below 9 are seen by all, earlier ones too."""
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool)) | (tokens < 9)[:, None, None, :]
    return jnp.where(seen, scores, -1e9)


def before(p: Any, tokens: jax.Array, h: jax.Array, scores: jax.Array) -> jax.Array:
    """A key is hidden where the token before it is below 9: what is read is beside the key."""
    marked = (jnp.pad(tokens[:, :-1], ((0, 0), (1, 0))) < 9)[:, None, None, :]
    own = jnp.eye(tokens.shape[1], dtype=bool)
    return earlier(p, tokens, h, jnp.where(marked & ~own, -1e9, scores))


Hide = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""A layer's parameters, tokens, states and scores [b,h,t,t] -> scores of what is to be seen."""


@dataclass(frozen=True)
class Way:
    """How a model does it."""

    turn: Turn = unturned
    embed: Embed = looked_up
    bias: Bias = unbiased
    hide: Hide = earlier
    repeat_first: bool = False  # two key heads repeated to four before they are turned, as some do


def weights() -> Any:
    rng = np.random.default_rng(0)
    layer = {
        "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH // 2), "v": (WIDTH, WIDTH // 2), "o": (WIDTH, WIDTH),
        "up": (WIDTH, 48), "down": (48, WIDTH), "scale": (WIDTH,), "bias": (8, HEADS), "fade": (WIDTH, HEADS),
    }  # fmt: skip
    shapes = {"embed": (VOCAB, WIDTH), "head": (WIDTH, VOCAB)}
    made: dict[str, Any] = {
        name: rng.normal(size=shape, scale=0.3).astype(np.float32) for name, shape in shapes.items()
    }
    for i in range(2):
        made[f"layer_{i}"] = {n: rng.normal(size=s, scale=0.3).astype(np.float32) for n, s in layer.items()}
    return made


def block(way: Way, p: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    b, t, _ = x.shape
    h = p["scale"] * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    q, k, v = (jnp.dot(h, p[n]).reshape(b, t, -1, HEAD) for n in "qkv")
    if way.repeat_first:
        k = jnp.repeat(k, 2, axis=2)
    q, k = way.turn(q), way.turn(k)
    k, v = (x if x.shape[2] == HEADS else jnp.repeat(x, 2, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5 + way.bias(p, t)[None]
    shares = jax.nn.softmax(way.hide(p, tokens, h, scores))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(b, t, WIDTH)
    x = x + jnp.dot(mixed, p["o"])
    return x + jnp.dot(jax.nn.silu(jnp.dot(x, p["up"])), p["down"])


def source(way: Way) -> Source:
    """A model that does it this way."""

    def forward(p: Any, tokens: jax.Array) -> jax.Array:
        x = way.embed(p, tokens)
        for i in range(2):
            x = block(way, p[f"layer_{i}"], x, tokens)
        return jnp.dot(x, p["head"])

    return effc.load(forward, weights(), name="small", context=CONTEXT)
