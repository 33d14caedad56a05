"""Routed recursion: a body of layers run again and again, each time on the tokens that a router lets go on.

Depth 0 runs on every token. At a later depth the tokens that are on are gathered, run and scattered
back, so that the others cost nothing. What a depth keeps (kv=recursion) are keys and values of its own
tokens alone, in their order; with kv=shared it reads those of depth 0.

Nothing looks ahead: whether a token is on follows from itself and from how many were on before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from effc.runtime.cache import Cache, Rows, Step, write
from effc.runtime.routing import Routing, admitted, training

Body = Callable[..., jax.Array]
"""(depth, step, x[b,n,d], *rows[b,n,...]) -> [b,n,d]: the layers of a depth on some tokens."""


@partial(jax.tree_util.register_dataclass, data_fields=("lengths", "entries"), meta_fields=("share", "slack"))
@dataclass(frozen=True)
class Depth:
    """What a depth keeps: rows of the lengths[b] tokens that ran it; none where it reads those of depth 0."""

    lengths: jax.Array
    entries: tuple[Rows, ...]
    share: float
    slack: int

    def empty(self, capacity: int) -> Depth:
        """Room for as many tokens as a sequence of `capacity` may send here, and one for a row that is not kept."""
        rows = min(capacity, math.ceil(self.share * capacity) + self.slack) + 1
        return Depth(jnp.zeros_like(self.lengths), tuple(e.empty(rows) for e in self.entries), self.share, self.slack)

    def kept_as(self, kind: str) -> Depth:
        """As `Rows`."""
        return replace(self, entries=tuple(e.kept_as(kind) for e in self.entries))


class Gathered:
    """The step of gathered tokens: the first valid[b] of n after lengths[b] rows that their depth keeps."""

    def __init__(self, n: int, valid: jax.Array, lengths: jax.Array, entries: tuple[Rows, ...] | None):
        self._n, self._valid, self._lengths = n, valid, lengths
        self._before, self._after = entries, list[Rows]()
        self.positions = lengths[:, None] + jnp.arange(n, dtype=jnp.int32)[None]

    def append(self, *values: jax.Array, cache: str = "float") -> tuple[jax.Array, ...]:
        """Each [b,n,...] after the rows of its depth."""
        before = self._before[len(self._after)] if self._before is not None else None
        rows = Rows.of(values, before.kind if before else cache)
        if before is not None:
            rows = replace(rows, values=jax.tree.map(self._write, before.values, rows.values))
        self._after.append(rows)
        return rows.all()

    def _write(self, old: jax.Array, new: jax.Array) -> jax.Array:
        """Rows that are not tokens fall off the end, or onto the row that is spare."""
        if self._n == 1:
            return write(old, new, self._lengths)
        new, each = new.astype(old.dtype), old.shape[0] // self._lengths.shape[0]
        at = jnp.repeat(self.positions, each, axis=0)
        valid = jnp.repeat(self._valid, each)[:, None] > jnp.arange(self._n)[None]
        rows = jnp.where(valid, at, old.shape[1])
        return old.at[jnp.arange(old.shape[0])[:, None], rows].set(new, mode="drop")

    def entries(self) -> tuple[Rows, ...]:
        return tuple(self._after)


class Borrowing:
    """The step of gathered tokens that read what depth 0 kept: theirs is thrown away."""

    def __init__(self, positions: jax.Array, entries: Sequence[Rows]):
        self.positions, self._entries = positions, list(entries)

    def append(self, *values: jax.Array, cache: str = "float") -> tuple[jax.Array, ...]:
        """Rows of depth 0 for the same layer."""
        return self._entries.pop(0).all()


def recurse(
    step: Step, body: Body, router: jax.Array, x: jax.Array, *rows: jax.Array, times: int, capacity: Sequence[float],
    select: str = "expert", gate: str = "delta", alpha: float = 0.0, slack: int = 16, kv: str = "recursion",
) -> jax.Array:  # fmt: skip
    """x[b,t,d] after up to `times` runs of the body; rows[b,t,...] go with their tokens.

    capacity: the share of tokens that each depth takes at most, `slack` more at the start of a sequence.
    gate delta: x + g (Body(x) - x), so that g = 1 is the plain recursion; paper: x + g Body(x).
    """
    learning = training()
    routing = Routing(router, select, tuple(capacity), alpha, learning)
    first, start = step.taken, x
    x, on = body(0, step, x, *rows), step.tokens()
    shared = step.grown(first) if kv == "shared" else None
    for depth in range(1, times):
        run = _Depth(step, partial(body, depth), capacity[depth], slack, gate, shared)
        choice = routing.choose(depth, start, x, on)
        limited = shared is None and learning is None and capacity[depth] < 1
        on = run.admit(choice.on) if limited else choice.on
        x = run(x, rows, on, choice.gate)
    return x


@dataclass(frozen=True)
class _Depth:
    """One later depth of a recursion in one call."""

    step: Step
    body: Body
    share: float
    slack: int
    gate: str
    shared: tuple[Rows, ...] | None

    def admit(self, wanted: jax.Array) -> jax.Array:
        """Those that find room."""
        before = self._before().lengths if self.step.cached else jnp.zeros(wanted.shape[0], jnp.int32)
        return admitted(wanted, before, self.step.positions, self.share, self.slack)

    def _before(self) -> Depth:
        (depth,) = self.step.ahead(1)
        assert isinstance(depth, Depth)
        return depth

    def __call__(self, x: jax.Array, rows: Sequence[jax.Array], on: jax.Array, g: jax.Array | None) -> jax.Array:
        """x with the tokens that are on moved; what the depth keeps goes into the step's cache."""
        order = jnp.argsort(~on, axis=1, stable=True)  # those that are on first, as they come
        count = jnp.sum(on, axis=1, dtype=jnp.int32)
        along = (*rows, *([] if g is None else [g]))
        if not self.step.cached:
            x, depth = self._turn(x, along, g is not None, order, count, self._kept(count * 0, None))
        else:
            x, depth = self._turns(x, along, g is not None, order, count)
        self.step.put([depth])
        return x

    def _kept(self, lengths: jax.Array, entries: tuple[Rows, ...] | None) -> Depth:
        return Depth(lengths, entries or (), self.share, self.slack)

    def _turns(
        self, x: jax.Array, along: tuple[jax.Array, ...], gates: bool, order: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Depth]:
        """A few tokens of each sequence at a time, as long as there are any: where none is on nothing runs."""
        t = order.shape[1]
        size = min(t, -(-math.ceil(self.share * t) // 8) * 8)
        order = jnp.pad(order, ((0, 0), (0, -t % size)), constant_values=t)
        turns = -(-jnp.max(count) // size)

        def turn(carry: tuple[jax.Array, jax.Array, Depth]) -> tuple[jax.Array, jax.Array, Depth]:
            i, x, depth = carry
            index = lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
            x, depth = self._turn(x, along, gates, index, jnp.clip(count - i * size, 0, size), depth)
            return i + 1, x, depth

        _, x, depth = lax.while_loop(lambda carry: carry[0] < turns, turn, (jnp.int32(0), x, self._before()))
        return x, depth

    def _turn(
        self, x: jax.Array, along: tuple[jax.Array, ...], gates: bool, index: jax.Array, valid: jax.Array, depth: Depth
    ) -> tuple[jax.Array, Depth]:
        """The first valid[b] of the tokens index[b,n]: gathered, run, scattered back."""
        old, *rest = (_rows(value, index) for value in (x, *along))
        g = rest.pop() if gates else None
        step = self._step(index, valid, depth)
        new = moved(old, self.body(step, old, *rest), g, self.gate)
        kept = jnp.arange(index.shape[1])[None] < valid[:, None]
        place = jnp.where(kept, index, x.shape[1])
        x = x.at[jnp.arange(x.shape[0])[:, None], place].set(new.astype(x.dtype), mode="drop")
        entries = step.entries() if isinstance(step, Gathered) else ()
        return x, Depth(depth.lengths + valid, entries, self.share, self.slack)

    def _step(self, index: jax.Array, valid: jax.Array, depth: Depth) -> Gathered | Borrowing:
        if self.shared is not None:
            return Borrowing(_rows(self.step.positions, index), self.shared)
        return Gathered(index.shape[1], valid, depth.lengths, depth.entries if self.step.cached else None)


def moved(old: jax.Array, new: jax.Array, g: jax.Array | None, gate: str) -> jax.Array:
    """States of tokens that ran: old and new [b,n,d], g[b,n] (None: 1)."""
    if gate == "paper":
        return old + (new if g is None else g[..., None].astype(new.dtype) * new)
    return new if g is None else old + g[..., None].astype(new.dtype) * (new - old)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b,t,...] at index[b,n]; an index past the end gives any row."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1, mode="clip")


def mean_depth(cache: Cache) -> jax.Array:
    """f32[]: how many depths the tokens of a cache ran on average; 1 where nothing is routed."""
    ran = [jnp.sum(entry.lengths) for entry in cache.entries if isinstance(entry, Depth)]
    return 1 + sum(ran, jnp.zeros((), jnp.int32)) / jnp.maximum(jnp.sum(cache.lengths), 1)
