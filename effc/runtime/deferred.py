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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Waiting:
    """An entry of a cache, after those of all layers: of the last tokens the state at the exit and each value that
    layers read beside it, slots[i] of these [b,1,...], the newest last; count f32[b,1] of them wait, alike in all rows.

    A float, and a slot a token, so that a native region goes on past it and nothing is moved but references.
    """

    slots: tuple[tuple[jax.Array, ...], ...]
    count: jax.Array

    @staticmethod
    def none(values: Sequence[jax.Array], most: int) -> Waiting:
        """Room for `most` tokens with values [b,t,...]."""
        slots = tuple(tuple(jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype) for x in values) for _ in range(most))
        return Waiting(slots, jnp.zeros((values[0].shape[0], 1), jnp.float32))

    @property
    def most(self) -> int:
        """How many may wait."""
        return len(self.slots)

    def empty(self, capacity: int) -> Waiting:
        """Nothing waits, whatever the length of texts."""
        return Waiting.none(self.slots[0], self.most)

    def kept_as(self, kind: str) -> Waiting:
        """States are no keys and values."""
        return self

    def other(self, count: int) -> jax.Array:
        """f32[b,1]: 0 where so many tokens wait, else 1."""
        return (self.count != count).astype(jnp.float32)

    def before(self, count: int, values: Sequence[jax.Array]) -> list[jax.Array]:
        """Each [b,count+1,...]: of the last `count` tokens, then values[b,1,...]."""
        return [_joined(rows) for rows in zip(*self.slots[self.most - count :], tuple(values), strict=True)]

    def after(self, values: Sequence[jax.Array], stays: jax.Array) -> Waiting:
        """With the token too where stays f32[b,1] is 1 in all rows; else all have caught up."""
        waits = stays if stays.shape[0] == 1 else jnp.broadcast_to(jnp.min(stays), stays.shape)
        return Waiting((*self.slots[1:], tuple(values)), (self.count + 1) * waits)


def _joined(rows: Sequence[jax.Array]) -> jax.Array:
    """Along tokens, written as along the last axis: that is what native regions know."""
    flat = [x.reshape(x.shape[0], -1) for x in rows]
    joined = jnp.concatenate(flat, axis=-1) if len(flat) > 1 else flat[0]
    return joined.reshape(rows[0].shape[0], len(rows), *rows[0].shape[2:])


def last(x: jax.Array) -> jax.Array:
    """The last token's row [b,1,d] of x[b,t,d], likewise."""
    b, t, d = x.shape
    return x.reshape(b, t * d)[:, (t - 1) * d :].reshape(b, 1, d)


__all__: list[Any] = ["Waiting", "last"]
