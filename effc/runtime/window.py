"""Ops that look back otherwise than by attention: running totals, recurrences, and functions of many rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from effc.runtime.cache import EXACT, Step


def window(step: Step, body: Callable[..., Any], *values: Array, fixed: int = 0, lookback: int = -1) -> Any:
    """body(*values) for values [b,t,...] of the new tokens, as if it saw those of every token.

    The last `fixed` values are no rows and stay as they are. body takes arrays [b,S,...] that start at
    position 0 and must be causal: rows past a sequence's length hold anything finite. With `lookback` n
    rows need none but themselves and n before, wherever they stand; without, a call costs O(S).
    """
    rows, rest = values[: len(values) - fixed], values[len(values) - fixed :]
    if lookback == 0:
        return body(*values)
    full = step.append(*rows, cache=EXACT)
    if not step.cached:
        return body(*full, *rest)
    count = rows[0].shape[1]
    near = lookback + count
    if lookback < 0 or near >= full[0].shape[1]:
        return jax.tree.map(step.rows, body(*full, *rest))
    start = jnp.clip(step.lengths - lookback, 0, full[0].shape[1] - near)
    out = body(*(_cut(x, start, near) for x in full), *rest)
    return jax.tree.map(lambda x: _cut(x, step.lengths - start, count), out)


def _cut(x: Array, start: Array, count: int) -> Array:
    """Rows start[i] .. start[i]+count-1 of sequence i of x[b,S,...]."""
    return jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, count))(x, start)


COMBINED: dict[str, tuple[Callable[..., Array], Callable[[Array, Array], Array]]] = {
    "sum": (lax.cumsum, jnp.add),
    "prod": (lax.cumprod, jnp.multiply),
    "max": (lax.cummax, jnp.maximum),
    "min": (lax.cummin, jnp.minimum),
    "logsumexp": (lax.cumlogsumexp, jnp.logaddexp),
}
"""Running totals: along an axis, and of two parts."""


def running(step: Step, x: Array, *, fn: str) -> Array:
    """Total of x[b,t,...] over this and all earlier tokens; every token's total is kept."""
    along, both = COMBINED[fn]
    total, before = along(x, 1), step.previous()
    if before is not None:
        some = _each(step.lengths > 0, total.ndim)
        total = jnp.where(some, both(before[0][:, None], total).astype(x.dtype), total)
    step.append(total, cache=EXACT)
    return total


def recur(step: Step, body: Callable[..., Any], *operands: Array, consts: int, carry: int) -> Any:
    """A recurrence over tokens: operands are constants, first carries [b,...], then what is read, [b,t,...].

    body(constants, carries, items) of one sequence gives its next carries, then results: [b,t,...] here.
    The carry after every token is kept.
    """
    fixed, state, rows = operands[:consts], operands[consts : consts + carry], operands[consts + carry :]
    before = step.previous()
    if before is not None:
        some = step.lengths > 0
        state = tuple(jnp.where(_each(some, old.ndim), old, new) for old, new in zip(before, state, strict=True))

    def advance(carried: Any, items: Any) -> Any:
        out = _tuple(body(*fixed, *carried, *items))
        return out[:carry], out

    count = step.positions.shape[1]
    out = jax.vmap(lambda first, items: lax.scan(advance, first, items, count)[1])(tuple(state), tuple(rows))
    step.append(*out[:carry], cache=EXACT)
    results = out[carry:]
    return results[0] if len(results) == 1 else results


def _tuple(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _each(which: Array, rank: int) -> Array:
    """which[b] against values [b,...] of a rank."""
    return which.reshape(-1, *(1,) * (rank - 1))
