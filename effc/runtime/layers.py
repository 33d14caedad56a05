"""What the IR's transformer ops compute, in plain JAX. Interpreter and emitted programs call these.

Shapes: b sequences, t tokens of this call, S keys so far, d width, h query heads, g key/value heads.
Softmax, norms and sums of products are f32; results have the dtype of the first operand unless
`dtype` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effc.runtime import coded, quantized
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.region.record import recorded
from effc.runtime.kernels.vocabulary.reference import Top, of_logits
from effc.runtime.packed import Packed
from effc.runtime.qarray import QArray
from effc.runtime.rounding import fake_quant as fake_quant  # emitted programs find all layers here

Weight = jax.Array | QArray | Packed

_LEARNING: ContextVar[bool] = ContextVar("learning", default=False)

_TURNING = ("v5e", "v6e", "tpu7x")
"""Generations of TPUs where numbers are brought their partners by a product; v5p's compiler leaves that in HBM."""

BiasFn = Callable[..., jax.Array]
"""(query position, key position, head: i32[], the key's rows, the query's) -> f32[] added to that score."""


@contextmanager
def learning() -> Iterator[None]:
    """What is traced inside will be differentiated."""
    token = _LEARNING.set(True)
    try:
        yield
    finally:
        _LEARNING.reset(token)


@recorded
def norm(
    x: jax.Array, scale: jax.Array | None = None, bias: jax.Array | None = None, *,
    kind: str, eps: float, offset: float = 0.0, dtype: Any = None,
) -> jax.Array:  # fmt: skip
    """Over the last axis: rms x/sqrt(mean x^2+eps), layer (x-mean)/sqrt(var+eps); *(scale+offset)+bias."""
    wide = x.astype(jnp.float32)
    if kind == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * _along_last(scale.astype(jnp.float32) + offset if offset else scale, y)
    if bias is not None:
        y = y + _along_last(bias, y)
    return y.astype(dtype or x.dtype)


@dataclass(frozen=True)
class Normed:
    """A norm of x that is yet to be taken, since what reads it may do so."""

    x: jax.Array
    scale: jax.Array
    eps: float
    offset: float

    def taken(self) -> jax.Array:
        """As an array."""
        return norm(self.x, self.scale, kind="rms", eps=self.eps, offset=self.offset)


def normed(x: jax.Array, scale: jax.Array, *, kind: str, eps: float, offset: float = 0.0) -> Any:
    """`norm` that products alone read: on TPUs their kernel takes it."""
    if on_tpu.wanted() and kind == "rms" and x.dtype == jnp.float32 and not _LEARNING.get():
        return Normed(x, scale, eps, offset)
    return norm(x, scale, kind=kind, eps=eps, offset=offset)


def _of_norm(x: Normed, w: QArray, layout: str) -> jax.Array | None:
    """f32 [R,N], the product of rows; None where the kernel does not take the norm."""
    from effc.runtime.kernels.matmul import tpu  # Pallas takes half a second to import

    rows, how = x.x.reshape(-1, x.x.shape[-1]), {"eps": x.eps, "offset": x.offset}
    if not tpu.fits_norm(rows, w, x.scale, layout):
        return None

    def here(rows: jax.Array, w: QArray, scale: jax.Array) -> jax.Array:
        return quantized.here(norm(rows, scale, kind="rms", **how), w, layout)

    kernel = partial(tpu.of_norm, layout=layout, digits=tpu.digits_wanted(), **how)
    return on_tpu.either(kernel, here, rows, w, x.scale)


@recorded
def linear(
    x: jax.Array | Normed, w: Weight, bias: jax.Array | None = None, *, layout: str = "kn", dtype: Any = None
) -> jax.Array:
    """x[...,K] @ w[K,N] (layout nk: w[N,K]) + bias[N] -> [...,N]."""
    if isinstance(x, Normed):
        y = _of_norm(x, w, layout) if isinstance(w, QArray) else None
        if y is None:
            return linear(x.taken(), w, bias, layout=layout, dtype=dtype)
        x, y = x.x, y.reshape(*x.x.shape[:-1], -1)
    elif isinstance(w, QArray | Packed):
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        y = quantized.matmul(rows, w, layout).reshape(*x.shape[:-1], -1)
    else:
        y = _matmul(x, w.astype(x.dtype), layout)
    if bias is not None:
        y = y + _along_last(bias, y)
    return y.astype(dtype or x.dtype)


def _matmul(x: jax.Array, w: jax.Array, layout: str) -> jax.Array:
    """f32 [...,N]. A few rows against [N,K] are faster with the weights as the left operand."""
    rows = x.size // x.shape[-1] if x.size else 0
    if _LEARNING.get():
        return _product(x, w, 0 if layout == "kn" else 1)
    if layout == "kn":
        return _dot(x, w, x.ndim - 1, 0)
    if 1 < rows <= 16:
        return jnp.moveaxis(_dot(w, x, 1, x.ndim - 1), 0, -1)
    return _dot(x, w, x.ndim - 1, 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """f32 x[...,K] times w over that axis of w. JAX's own gradient of w comes out transposed: twice the time."""
    return _dot(x, w, x.ndim - 1, axis)


def _product_ahead(x: jax.Array, w: jax.Array, axis: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, w, axis), (x, w)


def _product_back(axis: int, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    g, rows = g.astype(x.dtype), tuple(range(x.ndim - 1))
    pair = (x, g) if axis == 0 else (g, x)
    back = lax.dot_general(*pair, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return _dot(g, w, x.ndim - 1, 1 - axis).astype(x.dtype), back.astype(w.dtype)


_product.defvjp(_product_ahead, _product_back)


def _dot(
    x: jax.Array, y: jax.Array, x_axis: int, y_axis: int, batch: int = 0, precision: str | None = None
) -> jax.Array:
    """f32 products over one axis of each; the first `batch` axes are shared."""
    shared = tuple(range(batch))
    axes = (((x_axis,), (y_axis,)), (shared, shared))
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def top(x: jax.Array, w: Weight, *, layout: str = "kn", softcap: float = 0.0) -> Top:
    """The likeliest tokens of softcap(x[b,t,K] @ w), and how likely, each [b,t]; TPUs write no logits for it."""
    rows = x.reshape(-1, x.shape[-1])
    written = partial(_top_written, layout=layout, softcap=softcap)
    if not on_tpu.wanted() or isinstance(w, Packed):
        return written(rows, w).reshape(x.shape[:-1])
    from effc.runtime.kernels.vocabulary import tpu  # Pallas takes half a second to import

    if not tpu.fits(rows, w, layout):
        return written(rows, w).reshape(x.shape[:-1])
    here = partial(written, here=True)
    kernel = partial(tpu.top, layout=layout, softcap=softcap)
    return on_tpu.either(kernel, here, rows, w).reshape(x.shape[:-1])


def _top_written(x: jax.Array, w: Weight, *, layout: str, softcap: float, here: bool = False) -> Top:
    """Of logits that are written; here: on no TPU."""
    if here and isinstance(w, QArray):
        logits = quantized.here(x.astype(jnp.float32), w, layout)
    else:
        logits = linear(x, w, layout=layout, dtype=jnp.float32)
    return of_logits(softcap * jnp.tanh(logits / softcap) if softcap else logits)


def _along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """vector[N] in like's rank and dtype."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


@recorded
def embed(ids: jax.Array, table: Weight, *, dtype: Any = None) -> jax.Array:
    """Rows of table[V,d] at ids[...] -> [...,d]; the ids must be in 0..V-1."""
    if isinstance(table, QArray | Packed):
        if isinstance(table, QArray) and table.axis == -1:
            return quantized.rows(table, ids).astype(dtype or jnp.float32)
        if table.axis == -1:
            return table.rows(ids).dequantize(dtype or jnp.float32)
        return jnp.take(table.dequantize(dtype or jnp.float32), ids, axis=0)
    return jnp.take(table, ids, axis=0).astype(dtype or table.dtype)


def rope_table(
    positions: jax.Array, freq: jax.Array | None = None, *, dims: int, theta: float = 0.0, scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position*freq[dims/2], each f32[b,t,dims/2] times scale."""
    if freq is None:
        freq = theta ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    return turns(positions, freq, of="cos", scale=scale), turns(positions, freq, of="sin", scale=scale)


@recorded
def turns(positions: jax.Array, freq: jax.Array, *, of: Literal["cos", "sin"], scale: float) -> jax.Array:
    """cos or sin of position*freq, f32[b,t,n] times scale."""
    angles = positions[..., None].astype(jnp.float32) * freq.reshape((1,) * positions.ndim + freq.shape)
    return (jnp.cos if of == "cos" else jnp.sin)(angles) * scale


@recorded
def rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, style: str = "half") -> jax.Array:
    """Rotate pairs of the first 2n dims of x[b,t,h,d], n = cos.shape[-1]: (i, i+n), or (2i, 2i+1)."""
    if on_tpu.wanted() and on_tpu.generation() in _TURNING and not _LEARNING.get():
        return on_tpu.either(partial(_turned, style=style), partial(_rotated, style=style), x, cos, sin)
    return _rotated(x, cos, sin, style=style)


def _turned(x: jax.Array, cos: jax.Array, sin: jax.Array, *, style: str) -> jax.Array:
    """`rope` for TPUs: a product with zeros and ones, exact, brings each number its partner, and XLA makes one op of it
    all. Halves taken apart and joined again would be two."""
    n, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    pairs, sign = np.eye(2)[::-1], np.array([-1, 1], np.float32)
    if style == "half":
        swap, signs, whole = np.kron(pairs, np.eye(n)), np.repeat(sign, n), partial(jnp.tile, reps=2)
    else:
        swap, signs, whole = np.kron(np.eye(n), pairs), np.tile(sign, n), partial(jnp.repeat, repeats=2, axis=-1)
    c, s = (
        jnp.pad(y, [(0, 0)] * 2 + [(0, rest)], constant_values=v)
        for y, v in ((whole(cos), 1), (whole(sin) * signs[None, None], 0))
    )
    partner = _dot(x, jnp.asarray(np.pad(swap, (0, rest)), x.dtype), 3, 0, precision="highest")
    return (x.astype(jnp.float32) * c[:, :, None] + partner * s[:, :, None]).astype(x.dtype)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array, *, style: str) -> jax.Array:
    n = cos.shape[-1]
    turned, rest = x[..., : 2 * n].astype(jnp.float32), x[..., 2 * n :]
    c, s = cos[:, :, None, :], sin[:, :, None, :]
    if style == "half":
        x1, x2 = turned[..., :n], turned[..., n:]
        y = jnp.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1)
    else:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
        y = jnp.stack([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1).reshape(turned.shape)
    y = y.astype(x.dtype)
    return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y


def attention(
    q: jax.Array, k: Any, v: Any, positions: jax.Array, bias_fn: BiasFn | None = None,
    keyed: Sequence[jax.Array] = (), asked: Sequence[jax.Array] = (), sinks: jax.Array | None = None, *,
    scale: float = 1.0, window: int = 0, softcap: float = 0.0,
) -> jax.Array:  # fmt: skip
    """q[b,t,h,d] k[b,S,g,d] v[b,S,g,e] -> [b,t,h,e]; key j is attended by i iff j <= positions[b,i].

    Key j sits at position j; window n leaves the last n; bias_fn sees rows of keyed[b,S,...] and asked[b,t,...].
    sinks[h] take part in the softmax as one score more, of no key.
    A query from which the bias hides every key takes the mean of the values so far. Keys past a
    query's position are unfilled cache rows: whatever is in k there has no effect, what is in v must be
    finite (it is multiplied by exactly 0; caches start as zeros). k and v may each be a `coded.Split`.
    """
    how = {"scale": scale, "window": window, "softcap": softcap}
    if on_tpu.wanted() and bias_fn is None and not _LEARNING.get():
        from effc.runtime.kernels.attention import choice  # Pallas takes half a second to import

        return choice.attend(partial(attended, **how), q, k, v, positions, sinks, **how)
    k, v = (x.decoded(len(q)) if isinstance(x, coded.Split) else x for x in (k, v))
    return attended(q, k, v, positions, bias_fn, keyed, asked, sinks, **how)


@recorded
def attended(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, bias_fn: BiasFn | None = None,
    keyed: Sequence[jax.Array] = (), asked: Sequence[jax.Array] = (), sinks: jax.Array | None = None, *,
    scale: float = 1.0, window: int = 0, softcap: float = 0.0,
) -> jax.Array:  # fmt: skip
    """`attention`, of XLA's own ops."""
    b, t, h, d = q.shape
    S, g, r = k.shape[1], k.shape[2], h // k.shape[2]
    rows = _by_head(q.reshape(b, t, g, r, d).transpose(0, 1, 3, 2, 4).reshape(b, t * r, g, d))
    scores = _dot(rows, _by_head(k).astype(q.dtype), 2, 2, batch=1).reshape(b, g, t, r, S) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias_fn is not None:
        bias = score_bias(bias_fn, positions, S, h, keyed, asked)
        scores = scores + bias.reshape(b, g, r, t, S).swapaxes(2, 3)
        if keyed or asked:  # several masks on one score must not add up to nothing at all
            scores = jnp.maximum(scores, jnp.finfo(jnp.float32).min)
    scores = jnp.where(visible(positions, S, window)[:, None, :, None, :], scores, -jnp.inf)
    if sinks is not None:
        beside = jnp.broadcast_to(sinks.astype(scores.dtype).reshape(1, g, 1, r, 1), (b, g, t, r, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, beside], -1), axis=-1)[..., :-1]
    else:
        weights = jax.nn.softmax(scores, axis=-1)
    weights = weights.astype(q.dtype).reshape(b * g, t * r, S)
    out = _dot(weights, _by_head(v).astype(q.dtype), 2, 1, batch=1).astype(q.dtype)
    return out.reshape(b, g, t, r, -1).transpose(0, 2, 1, 3, 4).reshape(b, t, h, -1)


def _by_head(x: jax.Array) -> jax.Array:
    """[b,n,g,d] as [b*g,n,d]: the shape products run in, and the one caches are stored in."""
    b, n, g, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b * g, n, d)


def visible(positions: jax.Array, S: int, window: int = 0) -> jax.Array:
    """bool[b,t,S]: which keys each query sees."""
    key = jnp.arange(S, dtype=positions.dtype)[None, None, :]
    query = positions[:, :, None]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def score_bias(
    bias_fn: BiasFn, positions: jax.Array, S: int, heads: int,
    keyed: Sequence[jax.Array] = (), asked: Sequence[jax.Array] = (),
) -> jax.Array:  # fmt: skip
    """f32[b,h,t,S] of a function of scalars and rows; what does not depend on an axis is computed once along it."""
    over = jax.vmap(lambda i, j, h, mine, others: bias_fn(i, j, h, *mine, *others), (None, 0, None, 0, None))  # keys
    over = jax.vmap(over, (0, None, None, None, 0))  # tokens
    over = jax.vmap(over, (None, None, 0, None, None))  # heads
    over = jax.vmap(over, (0, None, None, 0, 0))  # sequences
    keys, head = jnp.arange(S, dtype=jnp.int32), jnp.arange(heads, dtype=jnp.int32)
    return over(positions, keys, head, tuple(keyed), tuple(asked)).astype(jnp.float32)


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x)."""
    return x * jax.nn.sigmoid(x)


def gelu(x: jax.Array, *, approx: str = "tanh") -> jax.Array:
    """Gaussian error linear unit, by tanh or erf."""
    return jax.nn.gelu(x, approximate=approx == "tanh")


def softcap(x: jax.Array, *, cap: float) -> jax.Array:
    """cap * tanh(x / cap)."""
    return cap * jnp.tanh(x / cap)


def split(x: jax.Array, *, sizes: Sequence[int]) -> tuple[jax.Array, ...]:
    """The last axis cut into pieces of these sizes."""
    return tuple(lax.split(x, sizes, axis=x.ndim - 1))
