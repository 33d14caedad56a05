"""The token after the drafts that stand, for TPUs (Pallas): one pass over the rows of p and q where drafts ended.

The largest of log(max(0, p - q)) plus Gumbel noise is a draw from the residual whatever that sums to, so a row is
read once. Noise is made where it is used, of the bits that `jax.random` makes for the same key: every machine draws
the same token, but where two are equal to the last digits. XLA would write and read noise and residual, [R,V] each.

Registers hold eight rows: fewer sequences are cut into stretches of the vocabulary, whose best are compared last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.on_tpu import Call

LANES, SUBLANES = 128, 8

COLUMNS = 4096
"""Of a step, at most: taken one register's width at a time, all unrolled."""

_NOTHING = 2**31 - 1
_KINDS = (jnp.float32, jnp.int32, jnp.float32, jnp.int32)
"""Of the best score and where it is, for the residual and for p alone: what a lane keeps, and what comes out."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_ONE = 0x3F800000  # bits of 1.0
_TINY = 2.0**-126


def fits(p: jax.Array, q: jax.Array, keys: jax.Array) -> bool:
    """Whether the kernel takes rows of p and q [R,V] and keys key[R]: noise is that of JAX's own generator."""
    alike = p.shape == q.shape and p.ndim == 2 and p.dtype == q.dtype == jnp.float32 and p.size > 0
    by_place = bool(jax.config.jax_threefry_partitionable)  # pyright: ignore[reportAttributeAccessIssue]
    return alike and str(jax.random.key_impl(keys)) == "threefry2x32" and by_place


def draw(p: jax.Array, q: jax.Array, bits: jax.Array, *, columns: int = 0, interpret: bool = False) -> jax.Array:
    """As the reference; columns of a step, whole lanes, 0: chosen."""
    rows, vocab = p.shape
    parts = SUBLANES // math.gcd(rows, SUBLANES)
    width = -(-vocab // (parts * LANES)) * LANES
    cut = functools.partial(_cut, parts=parts, width=width)
    first = jnp.tile(jnp.arange(parts, dtype=jnp.int32) * width, rows)[:, None]
    halves = lax.bitcast_convert_type(jnp.repeat(bits, parts, axis=0), jnp.int32)
    found = _call([cut(p), cut(q), halves[:, :1], halves[:, 1:], first], min(columns or COLUMNS, width), interpret)
    scores, tokens, others, spare = (x.reshape(rows, parts) for x in found)
    left = _of_best(scores, tokens)
    return jnp.where(scores.max(axis=1) > -jnp.inf, left, _of_best(others, spare))


def _cut(x: jax.Array, parts: int, width: int) -> jax.Array:
    """[R*parts,width] of x[R,V], with zeros at the end."""
    return jnp.pad(x, ((0, 0), (0, parts * width - x.shape[1]))).reshape(-1, width)


def _of_best(scores: jax.Array, tokens: jax.Array) -> jax.Array:
    """i32[R]: the token of the best of each row's parts, the first of equals."""
    return jnp.take_along_axis(tokens, jnp.argmax(scores, axis=1)[:, None], axis=1)[:, 0]


def _call(operands: Sequence[jax.Array], columns: int, interpret: bool) -> Sequence[jax.Array]:
    rows, width = operands[0].shape
    count = pl.cdiv(width, columns)
    name = f"acceptance_{rows}x{width}_c{columns}"
    step = 2 * SUBLANES * columns * 4
    on_tpu.note(Call(name, step, rows // SUBLANES * count, 2 * step, times=rows // SUBLANES))
    tile = pl.BlockSpec((SUBLANES, columns), lambda i, n: (i, n))
    own = pl.BlockSpec((SUBLANES, 1), lambda i, n: (i, 0))
    return pl.pallas_call(
        functools.partial(_step, width=width, count=count),
        name=name,
        grid=(rows // SUBLANES, count),
        in_specs=[tile, tile, own, own, own],
        out_specs=[own] * len(_KINDS),
        out_shape=[jax.ShapeDtypeStruct((rows, 1), kind) for kind in _KINDS],
        scratch_shapes=[pltpu.VMEM((SUBLANES, LANES), kind) for kind in _KINDS],
        interpret=interpret,
    )(*operands)


def _step(p: Any, q: Any, high: Any, low: Any, first: Any, *refs: Any, width: int, count: int) -> None:
    """One stretch of columns of eight rows."""
    out, state, at, columns = refs[: len(_KINDS)], refs[len(_KINDS) :], pl.program_id(1), p.shape[1]
    pl.when(at == 0)(lambda: _begin(state))
    key, start = (high[...], low[...]), at * columns
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    best = tuple(ref[...] for ref in state)
    for c in range(0, columns, LANES):
        column = start + c + lane
        noise = _noise(key, first[...] + column)
        mine, theirs = p[:, c : c + LANES], q[:, c : c + LANES]
        if width % columns:  # what is past the end may be anything
            mine = jnp.where(column < width, mine, 0)
        residual, whole = _score(mine - theirs, noise), _score(mine, noise)
        best = (*_better(best[:2], residual, column), *_better(best[2:], whole, column))
    for ref, value in zip(state, best, strict=True):
        ref[...] = value
    pl.when(at == count - 1)(lambda: _merge(state, first[...], out))


def _begin(state: Sequence[Any]) -> None:
    for ref, kind in zip(state, _KINDS, strict=True):
        ref[...] = jnp.full(ref.shape, -jnp.inf if kind == jnp.float32 else 0, kind)


def _score(weight: jax.Array, noise: jax.Array) -> jax.Array:
    """-inf where there is no weight."""
    return jnp.where(weight > 0, jnp.log(weight) + noise, -jnp.inf)


def _better(best: tuple[jax.Array, ...], score: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The larger score of each lane and its column, the first of equals."""
    most, where = best
    return jnp.maximum(score, most), jnp.where(score > most, column, where)


def _merge(state: Sequence[Any], first: jax.Array, out: Sequence[Any]) -> None:
    """Of lanes one row each; columns become tokens."""
    for n in (0, 2):
        best, where = state[n][...], state[n + 1][...]
        most = jnp.max(best, axis=1, keepdims=True)
        column = jnp.min(jnp.where(best == most, where, _NOTHING), axis=1, keepdims=True)
        out[n][...], out[n + 1][...] = most, first + column


# -- noise --------------------------------------------------------------------------------------------------


def _noise(key: tuple[jax.Array, jax.Array], count: jax.Array) -> jax.Array:
    """Gumbel noise f32 number `count` of a key, as `jax.random.gumbel` makes it."""
    bits = _random(key, count)
    above_one = lax.bitcast_convert_type(lax.shift_right_logical(bits, 9) | _ONE, jnp.float32)
    return -jnp.log(-jnp.log(jnp.maximum(above_one - 1, _TINY)))


def _random(key: tuple[jax.Array, jax.Array], count: jax.Array) -> jax.Array:
    """i32 bits: threefry of twenty rounds on (0, count), both words in one (Salmon et al., SC 2011)."""
    words = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = words[0], count + words[1]
    for n in range(5):
        for distance in _ROTATIONS[n % 2]:
            x = x + y
            y = x ^ (y << distance | lax.shift_right_logical(y, 32 - distance))
        x, y = x + words[(n + 1) % 3], y + words[(n + 2) % 3] + (n + 1)
    return x ^ y
