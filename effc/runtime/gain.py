"""When to draft, and how much: what drafts of each kind have been worth so far, row by row.

A draft token has a level: how long the match is that it was copied from, how sure its drafter was. The
table counts how often tokens of a level were right, old counts fading; with the measured cost of verifying
that says how many tokens are worth sending. Each row goes by its own past alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

FADE = 0.97
"""What an old count keeps with each new one of its level."""

TRIALS = 4.0
"""Observations that the prior of a level stands for."""

WINDOW = 0.9
"""What the mean gain of a round keeps with each round."""

SURE = 1.05
"""How much more than plain decoding a draft must promise."""

FIRST_REST, LONGEST_REST = 16, 256
"""Rounds without drafting after drafts did not pay; doubled each time, up to the longest."""


@partial(jax.tree_util.register_dataclass, data_fields=("right", "tried", "gain", "rest", "resting"), meta_fields=())
@dataclass(frozen=True)
class Table:
    """right, tried f32[b,levels]; gain f32[b], tokens a round beyond its cost; rest, resting i32[b] rounds."""

    right: jax.Array
    tried: jax.Array
    gain: jax.Array
    rest: jax.Array
    resting: jax.Array

    @property
    def chances(self) -> jax.Array:
        """f32[b,levels]: how often a token of each level is right."""
        return self.right / self.tried

    @property
    def active(self) -> jax.Array:
        """bool[b]: rows that draft."""
        return self.resting == 0


def begin(rows: int, prior: Sequence[float]) -> Table:
    """Before any round; prior: how often tokens of each level are right."""
    chances = jnp.tile(jnp.asarray(prior, jnp.float32)[None, :], (rows, 1))
    zero = jnp.zeros(rows, jnp.int32)
    return Table(chances * TRIALS, jnp.full_like(chances, TRIALS), zero * 0.0, zero + FIRST_REST, zero)


def learned(table: Table, levels: jax.Array, right: jax.Array, seen: jax.Array) -> Table:
    """With what became of draft tokens levels i32[b,G]: right bool[b,G], known of those with seen bool[b,G]."""
    kinds = jnp.arange(table.tried.shape[1])[None, None, :]
    marks = ((levels[:, :, None] == kinds) & seen[:, :, None]).astype(jnp.float32)
    count = marks.sum(axis=1)
    kept = FADE**count
    hits = (marks * right[:, :, None]).sum(axis=1)
    return Table(table.right * kept + hits, table.tried * kept + count, table.gain, table.rest, table.resting)


def rested(table: Table, emitted: jax.Array, cost: jax.Array, drafted: jax.Array, going: jax.Array) -> Table:
    """After a round of emitted[b] tokens that cost[b] plain ones would have taken: rows that lose by it rest."""
    waking = going & ~table.active & (table.resting == 1)
    gain = jnp.where(going & drafted, WINDOW * table.gain + (1 - WINDOW) * (emitted - cost), table.gain)
    tired = going & table.active & (gain < -0.1)
    thrives = going & table.active & (gain > 0.1)
    resting = jnp.where(tired, table.rest, jnp.maximum(table.resting - going, 0))
    rest = jnp.where(tired, jnp.minimum(2 * table.rest, LONGEST_REST), table.rest)
    rest = jnp.where(thrives, FIRST_REST, rest)
    return Table(table.right, table.tried, jnp.where(waking, 0.0, gain), rest, resting)


def reaches(table: Table, levels: jax.Array) -> jax.Array:
    """f32[b,G]: how likely each of levels i32[b,G] is right with all before it."""
    return jnp.cumprod(jnp.take_along_axis(table.chances, levels, axis=1), axis=1)


def worth(reach: jax.Array, there: jax.Array, costs: Sequence[float]) -> jax.Array:
    """i32[b]: how many of reach[b,G] to send; there[b] are at hand, sending n costs costs[n] plain tokens."""
    expected = jnp.pad(jnp.cumsum(reach, axis=1), ((0, 0), (1, 0)))
    rate = (1 + expected) / jnp.asarray(costs, jnp.float32)[None, :]
    rate = rate.at[:, 0].multiply(SURE)
    rate = jnp.where(jnp.arange(len(costs))[None, :] <= there[:, None], rate, 0)
    return jnp.argmax(rate, axis=1).astype(jnp.int32)
