"""Layers that tokens left out, run later with the next token that takes all of them (state=deferred).

A token that leaves waits: its state at the exit is kept, and what its layers read beside it. The next token that
goes on takes those that wait along, so that the cache then holds what the full model would have put there; when
`most` wait, the next takes them along whether it is sure or not. Rows of a batch wait, and catch up, together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Waiting:
    """An entry of a cache, after those of all layers: of tokens that wait the state at the exit and each value that
    layers read beside it, rows [b,most,...] of those before and newest [b,1,...] of the last token; count f32[b,1]
    of tokens that wait, alike in all rows. A float, and the newest apart, so that a native region goes on past it."""

    rows: tuple[jax.Array, ...]
    newest: tuple[jax.Array, ...]
    count: jax.Array

    @staticmethod
    def none(values: Sequence[jax.Array], most: int) -> Waiting:
        """Room for `most` tokens with values [b,t,...]."""

        def room(count: int) -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype) for x in values)

        return Waiting(room(most), room(1), jnp.zeros((values[0].shape[0], 1), jnp.float32))

    @property
    def most(self) -> int:
        """How many may wait."""
        return self.rows[0].shape[1]

    def empty(self, capacity: int) -> Waiting:
        """Nothing waits, whatever the length of texts."""
        return Waiting.none(self.rows, self.most)

    def kept_as(self, kind: str) -> Waiting:
        """States are no keys and values."""
        return self

    def settled(self) -> Waiting:
        """With the newest among the rows."""
        at = jnp.maximum(self.count[0, 0].astype(jnp.int32) - 1, 0)
        pairs = zip(self.rows, self.newest, strict=True)
        rows = (lax.dynamic_update_slice_in_dim(old, new, at, axis=1) for old, new in pairs)
        return Waiting(tuple(rows), self.newest, self.count)

    def other(self, count: int) -> jax.Array:
        """f32[b,1]: 0 where so many tokens wait, else 1."""
        return (self.count != count).astype(jnp.float32)

    def before(self, count: int, values: Sequence[jax.Array]) -> list[jax.Array]:
        """Each [b,count+1,...]: the first `count` rows, then values[b,1,...]."""
        return [_joined(rows[:, :count], new) for rows, new in zip(self.rows, values, strict=True)]

    def after(self, values: Sequence[jax.Array], stays: jax.Array) -> Waiting:
        """With the token too where stays f32[b,1] is 1 in all rows; else all have caught up."""
        waits = stays if stays.shape[0] == 1 else jnp.broadcast_to(jnp.min(stays), stays.shape)
        return Waiting(self.rows, tuple(values), (self.count + 1) * waits)


def _joined(rows: jax.Array, new: jax.Array) -> jax.Array:
    """Along tokens, written as along the last axis: that is what native regions know."""
    flat = [x.reshape(x.shape[0], -1) for x in (rows, new)]
    joined = flat[1] if rows.shape[1] == 0 else jnp.concatenate(flat, axis=-1)
    return joined.reshape(new.shape[0], rows.shape[1] + 1, *new.shape[2:])


def last(x: jax.Array) -> jax.Array:
    """The last token's row [b,1,d] of x[b,t,d], likewise."""
    b, t, d = x.shape
    return x.reshape(b, t * d)[:, (t - 1) * d :].reshape(b, 1, d)


__all__: list[Any] = ["Waiting", "last"]
