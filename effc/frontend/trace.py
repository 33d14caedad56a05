"""Flax -> jaxpr: the forward function traced at two call sizes, parameters known by path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effc.errors import EffcError
from effc.ir.types import Dim, Size, name_dim, polynomial

POINTS = ((2, 12), (3, 16))
"""The two (b, t) at which a model is traced: no size of one is a size of the other."""


@dataclass(frozen=True)
class Traced:
    """Two traces of one program. The jaxprs' inputs are the parameters, in `paths`, then tokens."""

    paths: tuple[str, ...]
    first: Any
    second: Any
    points: tuple[tuple[int, int], tuple[int, int]]
    again: Callable[[int, int], Any] | None = None  # the same program at another (b, t)


def leaf_paths(spec: Any) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    """Leaves of a parameter tree with their paths, `layers_0/attn/q/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(spec)
    return [("/".join(_key(k) for k in path), leaf) for path, leaf in leaves]


def _key(key: Any) -> str:
    for field in ("key", "idx", "name"):
        value = getattr(key, field, None)
        if value is not None:
            return str(value)
    return str(key)


def trace(forward: Callable[..., Any], spec: Any, points: tuple[tuple[int, int], ...] = POINTS) -> Traced:
    """Trace `forward(params, tokens)` at both points; no array is read."""
    paths = tuple(path for path, _ in leaf_paths(spec))
    again = partial(_trace_at, forward, spec)
    return Traced(paths, again(*points[0]), again(*points[1]), (points[0], points[1]), again)


def _trace_at(forward: Callable[..., Any], spec: Any, b: int, t: int) -> Any:
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    with scans_in_order():
        jaxpr = jax.make_jaxpr(forward)(spec, tokens)
    if len(jaxpr.out_avals) != 1:
        raise EffcError(f"forward: returns {len(jaxpr.out_avals)} arrays, want logits [batch, length, vocabulary]")
    _check_logits(jaxpr.out_avals[0].shape, b, t)
    return jaxpr


@contextmanager
def scans_in_order() -> Iterator[None]:
    """While this lasts, associative scans are written as scans: their own text changes with the length."""
    known = jax.lax.associative_scan
    jax.lax.associative_scan = associative_scan
    try:
        yield
    finally:
        jax.lax.associative_scan = known


def associative_scan(fn: Callable[..., Any], elems: Any, reverse: bool = False, axis: int = 0) -> Any:
    """What jax.lax.associative_scan computes, one element after the other."""
    rows = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), elems)
    first = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), rows)

    def step(state: Any, row: Any) -> Any:
        begun, before = state
        both = jax.tree.map(lambda new, x: jnp.where(begun, new, x), fn(before, row), row)
        return (jnp.array(True), both), both

    _, out = jax.lax.scan(step, (jnp.array(False), first), rows, reverse=reverse)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), out)


def _check_logits(shape: tuple[int, ...], b: int, t: int) -> None:
    if len(shape) == 3 and shape[:2] == (b, t):
        return
    what = f"forward: tokens [{b},{t}] give an array of shape {list(shape)}, want logits [{b},{t},vocabulary]"
    if shape[:1] == (b,) and len(shape) == 2:
        what += "; the forward returns one position only: return the logits of all"
    raise EffcError(what)


def formula(p: int, q: int, points: tuple[tuple[int, int], tuple[int, int]]) -> Size | None:
    """The size that is `p` at the first point and `q` at the second: c * b^i * t^j + offset, simplest first."""
    if p == q:
        return p
    found: list[tuple[tuple[Any, ...], Size]] = []
    for rank, (i, j) in enumerate(((1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 1))):
        m, n = (b**i * t**j for b, t in points)
        c = Fraction(p - q, m - n)
        offset = p - c * m
        if c <= 0 or offset.denominator != 1 or c.denominator > (8 if i == 0 else 1):
            continue  # nobody halves a batch, nor cuts a length into more than eight at so few tokens
        monomial = tuple((name, power) for name, power in (("b", i), ("t", j)) if power)
        cost = (offset != 0, c.denominator != 1, c != 1, abs(offset), rank)
        found.append((cost, polynomial({monomial: c, (): offset})))
    return min(found, key=lambda item: item[0])[1] if found else None


B: Dim = name_dim("b")
T: Dim = name_dim("t")
