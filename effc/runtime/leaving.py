"""Decoding with early exits: the threshold that holds for each token, and a count of the layers that ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from effc.errors import EffcError
from effc.runtime.cache import Cache, Entry
from effc.runtime.program import Program

State = dict[str, Any]

ALWAYS = 2**31 - 1


@dataclass(frozen=True)
class Exits:
    """A program's exits: entry(params, tokens, cache, threshold=, progress=) -> (logits, layers, cache); with
    likeliest=True tokens in place of logits.

    threshold is certified for greedy text of up to `tokens` tokens; 1 where nothing is. most: sequences at once up to
    which it is used, 0 any number: more may be slower by it.
    """

    entry: Callable[..., Any]
    layers: int
    threshold: float = 1.0
    tokens: int = 0
    most: int = 0
    beside: dict[int, tuple[Entry, ...]] = field(
        default_factory=dict[int, tuple[Entry, ...]], repr=False, compare=False
    )
    """By sequences, what `with_waiting` has found out: to trace the program takes longer than a short text."""

    def begin(self, params: Any, state: State, new: int, asked: float | None, certified: bool) -> State:
        """The state with what exits need, or as it is where the full model is to run all the time.

        asked: a threshold without guarantee; None: the certified one, where this way of choosing is `certified`.
        """
        few = not self.most or state["cache"].lengths.shape[0] <= self.most
        threshold = asked if asked is not None else self.threshold if certified and few else 1.0
        if not 0 <= threshold <= 1:
            raise EffcError(f"exits: threshold {threshold:g}, want 0 (always leave) to 1 (never)")
        if threshold >= 1:
            return state
        own = {
            "threshold": jnp.float32(threshold),
            "begun": state["cache"].lengths,
            "until": jnp.int32(ALWAYS if asked is not None else self.tokens),
            "total": jnp.float32(self.tokens or new),
            "counts": jnp.zeros(self.layers + 1, jnp.int32),
        }
        own = jax.tree.map(jnp.copy, own)  # no array twice: they are donated
        return {**state, "cache": self.with_waiting(params, state["cache"]), "exits": own}

    def idle(self, rows: int, asked: float | None, certified: bool) -> str:
        """Why all layers run for texts that were not told otherwise; "" where tokens leave."""
        if asked is not None:
            return ""
        if self.threshold >= 1:
            return "no threshold is certified that is faster"
        if not certified:
            return "the threshold is certified for the likeliest tokens, not for these"
        many = bool(self.most) and rows > self.most
        return f"exits are for {self.most} text at a time, more are slower by them" if many else ""

    def with_waiting(self, params: Any, cache: Cache) -> Cache:
        """The cache with what the exits' own function keeps beside it: tokens that have yet to run layers."""
        rows = cache.lengths.shape[0]
        if rows not in self.beside:
            tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
            shapes = jax.eval_shape(lambda p, x, c: self.entry(p, x, c)[2], params, tokens, cache)
            self.beside[rows] = shapes.entries[len(cache.entries) :]
        more = [entry.empty(cache.capacity) for entry in self.beside[rows]]
        return Cache(cache.lengths, (*cache.entries, *more))

    def advance(self, params: Any, state: State, *, likeliest: bool = False) -> tuple[jax.Array, State]:
        """Logits [b,1,V], or their likeliest token [b,1], after the token chosen last; the state has the layers each
        row ran, for `counted`."""
        own = state["exits"]
        written = state["cache"].lengths - own["begun"] + 1
        threshold = jnp.where(written < own["until"], own["threshold"], 1.0)
        progress = jnp.clip(written / own["total"], 0, 1)
        tokens = state["token"][:, None]
        how = {"threshold": threshold, "progress": progress} | ({"likeliest": True} if likeliest else {})
        said, layers, cache = self.entry(params, tokens, state["cache"], **how)
        return said, {**state, "cache": cache, "exits": {**own, "ran": layers[:, 0]}}


def likeliest(entry: Callable[..., Any]) -> Callable[..., Any]:
    """(params, tokens, cache, threshold) -> (likeliest tokens i32[b,t], layers that each ran, cache)."""

    def call(params: Any, tokens: jax.Array, cache: Cache, threshold: Any) -> Any:
        return entry(params, tokens, cache, threshold=threshold, likeliest=True)

    return call


def counted(state: State, going: jax.Array) -> State:
    """The state with the layers counted that rows ran where going[b], where there are exits."""
    if "ran" not in state.get("exits", {}):
        return state
    own = dict(state["exits"])
    counts = own["counts"].at[own.pop("ran")].add(going.astype(jnp.int32))
    return {**state, "exits": {**own, "counts": counts}}


@dataclass(frozen=True)
class Left:
    """Tokens by the number of layers they ran."""

    by_layers: Mapping[int, int]

    @property
    def tokens(self) -> int:
        return sum(self.by_layers.values())

    @property
    def average(self) -> float:
        """Layers a token."""
        return sum(n * count for n, count in self.by_layers.items()) / self.tokens if self.tokens else 0.0


def told(state: State) -> Left | None:
    """What was counted; None where every token ran all layers by design."""
    if "exits" not in state:
        return None
    return Left({n: int(count) for n, count in enumerate(state["exits"]["counts"]) if count})


def exits_of(program: Program) -> Exits | None:
    """What `DECODE` says; None where the program has no exits."""
    asked = program.decode
    if "early" not in asked:
        return None
    threshold, tokens = float(asked.get("threshold", 1.0)), int(asked.get("tokens", 0))
    return Exits(
        program.entries[str(asked["early"])], int(asked["layers"]), threshold, tokens, int(asked.get("most", 0))
    )
