"""Attention and caches of programs that may run on a TPU: kernels there, XLA elsewhere and where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from effc.runtime import coded
from effc.runtime.coded import Split
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.attention import append as rows
from effc.runtime.kernels.attention import tpu

Plain = Callable[..., jax.Array]
"""(q, k[b,S,g,d], v, positions, sinks=) -> [b,t,h,d]."""

Write = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(old, new, lengths) -> old with new in it."""


def attend(
    plain: Plain, q: jax.Array, k: Any, v: Any, positions: jax.Array, sinks: jax.Array | None, **how: Any
) -> jax.Array:
    """k and v [b,S,g,d], or both `Split`: the kernel then reads their codes where they lie."""
    here = partial(_decoded, plain)
    more = () if sinks is None else (sinks,)
    if not _fits(q, k, v):
        return here(q, k, v, positions, *more)
    return on_tpu.either(partial(_kernel, **how), here, q, k, v, positions, *more)


def append(write: Write, olds: Sequence[Any], news: Sequence[jax.Array], lengths: jax.Array) -> tuple[Any, ...]:
    """olds, each [b*g,S,...] or a Split, with rows of floats [b*g,t,...] of sequence i from row lengths[i] on."""
    count, batch = news[0].shape[1], len(lengths)
    parts = [_parts(old, new, batch) for old, new in zip(olds, news, strict=True)]
    flat = [part for each in parts for part in each]
    fit = [_written_there(old, count, batch) for old, _ in flat]
    taken = [part for part, fits in zip(flat, fit, strict=True) if fits]
    made: list[Any] = []
    if taken:
        made = on_tpu.either(rows.append, partial(_all_written, write), *map(list, zip(*taken)), lengths)
    there = iter(made)
    out = iter([next(there) if fits else _written(write, *part, lengths) for part, fits in zip(flat, fit, strict=True)])
    return tuple(_whole(old, [next(out) for _ in each]) for old, each in zip(olds, parts, strict=True))


def _parts(old: Any, new: jax.Array, batch: int) -> list[tuple[Any, Any]]:
    """What is written at once: a Split too, unless its scales lie so that the kernel cannot make them."""
    if not isinstance(old, Split):
        return [(old, new.astype(old.dtype))]
    if rows.fits_split(old, new.shape[1], batch):
        return [(old, new)]
    made = Split.of(new)
    return [(old.codes, made.codes), (old.scales, made.scales)]


def _whole(old: Any, parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else Split(*parts, width=old.width)


def _written_there(old: Any, count: int, batch: int) -> bool:
    return rows.fits_split(old, count, batch) if isinstance(old, Split) else rows.fits(old, count, batch)


def _all_written(write: Write, olds: list[Any], news: list[jax.Array], lengths: jax.Array) -> list[Any]:
    return [_written(write, old, new, lengths) for old, new in zip(olds, news, strict=True)]


def _written(write: Write, old: Any, new: jax.Array, lengths: jax.Array) -> Any:
    """Array by array."""
    made = Split.of(new) if isinstance(old, Split) else new
    return jax.tree.map(lambda kept, mine: write(kept, mine, lengths), old, made)


def _fits(q: jax.Array, k: Any, v: Any) -> bool:
    """Rows of a cache, more than there are queries; a prompt by itself is a product of matrices, XLA's."""
    if isinstance(k, Split) != isinstance(v, Split) or q.shape[1] >= k.shape[1]:
        return False
    queries, keys, values, _ = jax.eval_shape(_operands, q, k, v)
    return tpu.fits(queries, keys, values, keys.shape[0] // len(q))


def _kernel(q: jax.Array, k: Any, v: Any, positions: jax.Array, *sinks: jax.Array, **how: Any) -> jax.Array:
    queries, keys, values, scales = _operands(q, k, v)
    out = tpu.attend(queries, keys, values, scales, positions, *sinks, **how)
    return out[..., : v.width] if isinstance(v, Split) else out


def _operands(q: jax.Array, k: Any, v: Any) -> Any:
    """What the kernel takes of them."""
    if isinstance(k, Split):
        return coded.to_lanes(q), k.codes, v.codes, (_by_sequence(k.scales, len(q)), _by_sequence(v.scales, len(q)))
    return q, _by_head(k), _by_head(v), None


def _by_sequence(scales: jax.Array, batch: int) -> jax.Array:
    """[b,g,S] of [b*g,S]."""
    return scales.reshape(batch, -1, scales.shape[1])


def _by_head(x: jax.Array) -> jax.Array:
    """[b*g,S,d] of [b,S,g,d]: as caches are stored, so that XLA moves nothing."""
    b, S, g, d = x.shape
    return x.swapaxes(1, 2).reshape(b * g, S, d)


def _decoded(plain: Plain, q: jax.Array, k: Any, v: Any, positions: jax.Array, *sinks: jax.Array) -> jax.Array:
    wide = (x.decoded(len(q)) if isinstance(x, Split) else x for x in (k, v))
    return plain(q, *wide, positions, sinks=sinks[0] if sinks else None)
