"""Layers that tokens left out, run later with the next token that takes all of them (state=deferred).

A token that leaves waits: its state at the exit is kept, and what its layers read beside it. The next token that
goes on takes those that wait along, so that the cache then holds what the full model would have put there; when
`most` wait, the next takes them along whether it is sure or not. Rows of a batch wait, and catch up, together.

Layers are recorded and numbers are floats, so that a native region goes on past all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effc.runtime.cache import Cache, Step, append, write
from effc.runtime.kernels.region.record import recorded


@partial(jax.tree_util.register_dataclass, data_fields=("values", "count"), meta_fields=("shapes",))
@dataclass(frozen=True)
class Waiting:
    """An entry of a cache, after those of all layers: values [b,most+1,n], one an array: the state at the exit and what
    layers read beside it, each of a token's shape in `shapes`; of the first `count` f32[b,1] rows, alike in all
    sequences. They are written in place, and the row after them is the new token's."""

    values: tuple[jax.Array, ...]
    count: jax.Array
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def none(values: Sequence[jax.Array], most: int) -> Waiting:
        """Room for `most` tokens with values [b,t,...]."""
        shapes = tuple(x.shape[2:] for x in values)
        rows = (jnp.zeros((x.shape[0], most + 1, math.prod(x.shape[2:])), x.dtype) for x in values)
        return Waiting(tuple(rows), jnp.zeros((values[0].shape[0], 1), jnp.float32), shapes)

    @property
    def most(self) -> int:
        """How many may wait."""
        return self.values[0].shape[1] - 1

    def empty(self, capacity: int) -> Waiting:
        """Nothing waits, whatever the length of texts."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self)

    def kept_as(self, kind: str) -> Waiting:
        """States are no keys and values."""
        return self

    def other(self, count: int) -> jax.Array:
        """f32[b,1]: 0 where so many tokens wait, else 1."""
        return differs(self.count, number=count)

    def joined(self, values: Sequence[jax.Array]) -> Waiting:
        """With values [b,1,...] of the new token after those that wait."""
        at = self.count[:, 0].astype(jnp.int32)
        pairs = zip(self.values, values, strict=True)
        return replace(self, values=tuple(_with_row(old, new, at) for old, new in pairs))

    def rows(self, count: int) -> list[jax.Array]:
        """Each [b,count,...]: the first tokens."""
        pairs = zip(self.values, self.shapes, strict=True)
        return [first(value, count=count, shape=shape) for value, shape in pairs]

    def after(self, stays: jax.Array) -> Waiting:
        """With the new token waiting too where stays f32[b,1] is 1 in all rows; else all have caught up."""
        waits = stays if stays.shape[0] == 1 else jnp.broadcast_to(jnp.min(stays), stays.shape)
        return replace(self, count=(self.count + 1) * waits)


def _with_row(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    new = new.reshape(new.shape[0], 1, 1, -1)
    return append(old, new, at) if old.dtype == jnp.float32 else write(old, new[:, 0], at)


def last(x: jax.Array) -> jax.Array:
    """The last token's row [b,1,d] of x[b,t,d], written as along the last axis: that is what native regions know."""
    b, t, d = x.shape
    return x.reshape(b, t * d)[:, (t - 1) * d :].reshape(b, 1, d)


@dataclass(frozen=True)
class Behind:
    """Where a step stands that begins `count` tokens before another: lengths i32[b], positions i32[b,count+1]."""

    lengths: jax.Array
    positions: jax.Array

    @staticmethod
    def of(step: Step, count: int) -> Behind:
        """Of a step of one token."""
        begin = counted(step.lengths, start=-count, count=0)
        return Behind(begin, counted(step.lengths, start=-count, count=count + 1))

    def step(self, x: jax.Array, entries: Sequence[Any]) -> Step:
        """On tokens x[b,count+1,...], with what layers keep of those before."""
        return Step(x, Cache(self.lengths, tuple(entries)), positions=self.positions)


@recorded
def differs(count: jax.Array, *, number: int) -> jax.Array:
    """f32 as `count`: 0 where it is the number, else 1."""
    return (count != number).astype(jnp.float32)


@recorded
def first(rows: jax.Array, *, count: int, shape: tuple[int, ...]) -> jax.Array:
    """The first rows [b,count,*shape] of [b,most+1,n]."""
    return lax.slice_in_dim(rows, 0, count, axis=1).reshape(rows.shape[0], count, *shape)


@recorded
def counted(lengths: jax.Array, *, start: int, count: int) -> jax.Array:
    """i32[b,count]: from lengths[b] + start on; count 0: i32[b], that alone."""
    begin = lengths + start
    return begin[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :] if count else begin


__all__ = ["Behind", "Waiting", "last"]
