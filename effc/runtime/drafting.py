"""The speculative decoding loop: rounds of drafts verified in one call each, on the device from end to end.

Rounds of each width are a loop of their own inside one outer loop: a `while` carries caches in place,
where branches of a `cond` may copy them. The width 0 is plain decoding, so not drafting costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from effc.runtime import deferral, gain, speculate
from effc.runtime.sampling import Numbers, row_keys
from effc.runtime.speculate import NONE, Emission, Verdict

State = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen, as compiled in: greedy, or with these filters."""

    greedy: bool
    filters: frozenset[str]


@dataclass(frozen=True)
class Proposal:
    """tokens, levels i32[b,G]; i32[b]: there, how many there are, of these count are worth sending.

    q f32[b,G,V] where tokens were drawn from it. In a cascade a row has one token more than `count` if `beyond`:
    it is never sent, but the rule asks for its q; own f32[b,G,1 or V] are the drafter's own probabilities.
    """

    tokens: jax.Array
    levels: jax.Array
    there: jax.Array
    count: jax.Array
    q: jax.Array | None = None
    beyond: jax.Array | None = None
    own: jax.Array | None = None


jax.tree_util.register_dataclass(Proposal, ("tokens", "levels", "there", "count", "q", "beyond", "own"), ())


class Drafter(Protocol):
    """Proposes what may follow. `own` is what it keeps between rounds, any tree of arrays."""

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn from q where sampling is asked for; else they are no draw."""
        ...

    def ahead(self, params: Any, state: State, choice: Choice, chosen: jax.Array, others: Sequence[jax.Array]) -> Any:
        """What of `propose` can be made while it is open which drafts stand, from what the target chooses after each
        token of a call, i32[b,n], and what it gave beside logits; None where nothing can."""
        ...

    def propose(
        self, params: Any, state: State, numbers: Numbers, choice: Choice, first: bool = False, ahead: Any = None
    ) -> tuple[Proposal, State]:
        """Drafts after the known tokens, and the state after; `first`: there is a whole prompt to read."""
        ...


MANY = 8
"""Sequences at which costs are measured a second time: a fuller batch pays more for each token it verifies."""


@dataclass(frozen=True)
class Widths:
    """Draft lengths that are compiled, from 0 up; in plain steps, what verifying n tokens costs and making one.

    many: both for MANY sequences at once, where they were measured. rate: tokens that a plain step's time is worth,
    of one sequence.
    """

    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    draft: float = 0.0
    many: tuple[tuple[float, ...], float] | None = None
    rate: float = 1.0

    def at(self, rows: int) -> Widths:
        """With the costs of a batch of so many sequences: between those measured, by its logarithm."""
        if self.many is None or rows == 1:
            return self
        share, (curve, draft) = min(1.0, math.log(rows, MANY)), self.many
        costs = tuple((1 - share) * one + share * other for one, other in zip(self.costs, curve, strict=True))
        return Widths(self.sizes, costs, (1 - share) * self.draft + share * draft)

    @property
    def most(self) -> int:
        """Tokens a draft may have."""
        return self.sizes[-1]

    def index(self, count: jax.Array, lengths: jax.Array, active: jax.Array, context: int | None) -> jax.Array:
        """i32[]: which size serves every active row, within the context."""
        need = jnp.max(jnp.where(active, count, 0))
        wanted = sum((need > size).astype(jnp.int32) for size in self.sizes[:-1])
        if context is None:
            return jnp.asarray(wanted)
        longest = jnp.max(jnp.where(active, lengths, 0))
        fits = sum((longest + size + 1 <= context).astype(jnp.int32) for size in self.sizes[1:])
        return jnp.minimum(wanted, fits)


def widths(
    gamma: int, verify: Sequence[float], draft: float = 0.0, many: tuple[Sequence[float], float] | None = None,
    rate: float = 1.0,
) -> Widths:  # fmt: skip
    """For drafts of up to gamma tokens; verify[k] is what a call on k+1 tokens costs, in calls on one."""
    halves = ((gamma + 1) // 2, gamma) if gamma < 9 else (gamma // 4, gamma // 2, gamma)
    # Few drafts are cheap to compile for, and each one sent for nothing is a large part of what they gain.
    sizes = (0, *(range(1, gamma + 1) if gamma < 4 else halves))

    def costs(curve: Sequence[float]) -> tuple[float, ...]:
        sent = (next(s for s in sizes if s >= n) for n in range(gamma + 1))
        return tuple(curve[min(n, len(curve) - 1)] for n in sent)

    return Widths(sizes, costs(verify), draft, many and (costs(many[0]), many[1]), rate)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("rounds", "calls", "made", "drafted", "accepted", "emitted", "deferred"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Tally:
    """rounds i32[widths]; calls, rows that took part; made, draft tokens sent or not; emitted: i32[].

    drafted, accepted i32[G]: those sent, by position. deferred f32[]: of the tokens emitted those that a cascade's
    rule left to the target, by the drafter's probability of what it defers.
    """

    rounds: jax.Array
    calls: jax.Array
    made: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    emitted: jax.Array
    deferred: jax.Array


def empty_tally(widths: Widths) -> Tally:
    """Nothing yet."""
    zero, each = jnp.int32(0), jnp.zeros(widths.most, jnp.int32)
    return Tally(jnp.zeros(len(widths.sizes), jnp.int32), zero, zero, each, each, zero, jnp.float32(0))


@dataclass(frozen=True)
class Loop:
    """What is compiled in: verify(params, tokens, cache) -> (logits, *others, cache), and how drafts are made.

    rule: a cascade's, by name; without one what is drawn is the target's own distribution.
    """

    verify: Callable[..., Any]
    drafter: Drafter
    widths: Widths
    context: int | None
    choice: Choice
    rule: str = ""

    def __call__(
        self, params: Any, state: State, numbers: Numbers, stops: jax.Array, *, chunk: int
    ) -> tuple[State, jax.Array]:
        """The state after rounds until a row has `chunk` tokens more, and those, i32[b,chunk+G], NONE in between."""
        rows = state["token"].shape[0]
        # A row that has ended may lie a whole round past `chunk`; what the rounds of others write there, nothing,
        # needs room too: an update that does not fit is moved, over tokens.
        out = jnp.full((rows, chunk + 2 * self.widths.most + 1), NONE, jnp.int32)
        carry = (state, out, jnp.zeros(rows, jnp.int32))

        def going(carry: Any) -> jax.Array:
            state, _, filled = carry
            active = _active(state)
            return jnp.any(active) & jnp.all(~active | (filled < chunk))

        def of_kind(at: int, on: bool, carry: Any) -> jax.Array:
            state = carry[0]
            return going(carry) & (self._width(state) == at) & ((at > 0) | (_drafting(state) == on))

        def turns(carry: Any) -> Any:
            for at, size in enumerate(self.widths.sizes):
                for on in (False, True) if size == 0 else (True,):
                    body = partial(self._turn, params, numbers, stops, size, on)
                    carry = lax.while_loop(partial(of_kind, at, on), body, carry)
            return carry

        state, out, _ = lax.while_loop(going, turns, carry)
        return state, out[:, : chunk + self.widths.most]

    def first(self, params: Any, state: State, numbers: Numbers) -> State:
        """The state with the first drafts."""
        return self._proposed(params, state, numbers, first=True)

    def _width(self, state: State) -> jax.Array:
        return self.widths.index(_wanted(state), state["cache"].lengths, _active(state), self.context)

    def _turn(self, params: Any, numbers: Numbers, stops: jax.Array, size: int, on: bool, carry: Any) -> Any:
        """A round of `size` drafts at most; on: some row goes on drafting."""
        state, out, filled = carry
        active, proposal, cache = _active(state), state["proposal"], state["cache"]
        drafts = proposal.tokens[:, :size]
        count = jnp.minimum(jnp.where(active, _wanted(state), 0), size)
        tokens = jnp.concatenate([state["token"][:, None], drafts], axis=1)
        before = cache.lengths
        logits, *others, cache = self.verify(params, tokens, cache)
        keys, seen = position_keys(state, before + 1, size + 1), speculate.seen_after(state["seen"], drafts)
        chosen = self._chosen(logits, seen, keys, numbers)
        # Before anything else reads what is chosen: native code goes on from the target to the drafter in one call.
        ahead = self.drafter.ahead(params, state, self.choice, chosen, others) if on and chosen is not None else None
        verdict, deferred = self._judge(logits, chosen, drafts, count, state, numbers, before, seen, keys)
        given = speculate.emission(verdict, drafts, stops, jnp.where(active, state["left"], 0))
        shown = jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))(out, given.shown(), filled)
        seen = speculate.seen_after(state["seen"], jnp.where(given.tokens >= 0, given.tokens, 0))
        state = {
            **state,
            "cache": speculate.rolled_back(cache, before + given.count),
            "token": given.last(state["token"]),
            "done": state["done"] | given.ended,
            "left": state["left"] - given.count,
            "history": _written(state["history"], given.tokens, before + 1),
            "seen": None if seen is None else _row_at(seen, given.count),
            "table": self._learned(state, drafts, count, verdict, given, active),
            "tally": self._tallied(state, size, count, verdict, given, active, deferred),
            **_features(state, others, before),
        }
        return self._proposed(params, state, numbers, ahead=ahead), shown, filled + given.count

    def _chosen(self, logits: jax.Array, seen: jax.Array | None, keys: jax.Array, numbers: Numbers) -> jax.Array | None:
        """i32[b,G+1]: what the target takes after each token; None where that depends on what was drafted."""
        greedy, filters = self.choice.greedy, self.choice.filters
        if not greedy and self.drafter.draws:
            return None
        return speculate.chosen_at(logits, seen, keys, numbers, greedy=greedy, filters=filters)

    def _judge(
        self, logits: jax.Array, chosen: jax.Array | None, drafts: jax.Array, count: jax.Array, state: State,
        numbers: Numbers, before: jax.Array, seen: jax.Array | None, keys: jax.Array,
    ) -> tuple[Verdict, jax.Array | None]:  # fmt: skip
        """What stands, and in a cascade how much of each position, f32[b,G+1], was left to the target."""
        size, deferred = drafts.shape[1], None
        if chosen is not None:
            if self.rule:
                chosen, deferred = self._kept(logits, seen, chosen, state, numbers, before)
            return speculate.agreed(chosen, drafts, count), deferred
        p = speculate.probabilities(speculate.penalized(logits, seen, numbers), numbers, self.choice.filters)
        if self.rule:
            p, deferred = self._mixed(logits, seen, p, state, numbers, before)
        return speculate.reviewed(p, state["proposal"].q[:, :size], drafts, count, keys), deferred

    def _kept(
        self, logits: jax.Array, seen: jax.Array | None, chosen: jax.Array, state: State, numbers: Numbers,
        before: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """Of chosen i32[b,n], the likeliest tokens, those replaced by the drafter's that the rule keeps."""
        n, proposal = chosen.shape[1], state["proposal"]
        drafts, alpha = proposal.tokens[:, :n], alphas(state, before + 1, n)
        own = self._own(logits, seen, state, numbers, (drafts != chosen).astype(jnp.float32)[:, :, None])
        kept = deferral.stands(self.rule, alpha, own, drafts) & _has_q(proposal, n)
        return jnp.where(kept, drafts, chosen), 1 - kept.astype(jnp.float32)

    def _mixed(
        self, logits: jax.Array, seen: jax.Array | None, p: jax.Array, state: State, numbers: Numbers,
        before: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """What the cascade makes of p f32[b,n,V]: every position has its own q, the one after the drafts too."""
        n, proposal = p.shape[1], state["proposal"]
        q, there = proposal.q[:, :n], _has_q(proposal, n)
        own = self._own(logits, seen, state, numbers, deferral.variation(p, q))
        mixed, deferred = deferral.mixed(self.rule, alphas(state, before + 1, n), p, q, own)
        return jnp.where(there[:, :, None], mixed, p), jnp.where(there, deferred, 1)

    def _own(
        self, logits: jax.Array, seen: jax.Array | None, state: State, numbers: Numbers, tv: jax.Array
    ) -> deferral.Own:
        """Own probabilities are those before temperature and filters; a penalty on repetition is the model's."""
        p = jax.nn.softmax(speculate.penalized(logits, seen, numbers).astype(jnp.float32), axis=-1)
        own = state["proposal"].own
        return deferral.Own(p, None if own is None else own[:, : p.shape[1]], tv)

    def _learned(
        self, state: State, drafts: jax.Array, count: jax.Array, verdict: Verdict, given: Emission,
        active: jax.Array,
    ) -> gain.Table:  # fmt: skip
        """What the round tells: of drafts that are no draw also what those not sent would have been worth."""
        proposal, table, most = state["proposal"], state["table"], self.widths.most
        index = jnp.arange(most)[None, :]
        if self.drafter.draws and not self.choice.greedy:
            right = index < verdict.accepted[:, None]
            known = (index <= verdict.accepted[:, None]) & (index < count[:, None])
        else:
            tokens = jnp.pad(given.tokens, ((0, 0), (0, most)), constant_values=NONE)[:, :most]
            right = tokens == proposal.tokens[:, :most]
            before = jnp.pad(jnp.cumprod(right, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=1)
            known = (before > 0) & (index < jnp.minimum(given.count, verdict.accepted + 1)[:, None])
        known &= active[:, None] & (index < proposal.there[:, None])
        table = gain.learned(table, proposal.levels[:, :most], right, known)
        made = self.widths.draft * proposal.there
        cost = jnp.asarray(self.widths.costs, jnp.float32)[count] + made
        return gain.rested(table, given.count, cost, (count > 0) | (made > 0), active)

    def _tallied(
        self, state: State, size: int, count: jax.Array, verdict: Verdict, given: Emission, active: jax.Array,
        deferred: jax.Array | None,
    ) -> Tally:  # fmt: skip
        tally, proposal = state["tally"], state["proposal"]
        draws = proposal.there if proposal.beyond is None else proposal.count + proposal.beyond
        made, index = jnp.where(active, draws, 0).sum(), jnp.arange(self.widths.most)[None, :]
        left = jnp.float32(0)
        if deferred is not None:
            left = jnp.where(jnp.arange(size + 1)[None, :] < given.count[:, None], deferred, 0).sum()
        return Tally(
            tally.rounds.at[self.widths.sizes.index(size)].add(1),
            tally.calls + active.sum(),
            tally.made + made,
            tally.drafted + ((index < count[:, None]) & active[:, None]).sum(axis=0),
            tally.accepted + (index < jnp.minimum(verdict.accepted, given.count)[:, None]).sum(axis=0),
            tally.emitted + given.count.sum(),
            tally.deferred + left,
        )

    def _proposed(self, params: Any, state: State, numbers: Numbers, first: bool = False, ahead: Any = None) -> State:
        proposal, state = self.drafter.propose(params, state, numbers, self.choice, first, ahead)
        return {**state, "proposal": proposal}


def position_keys(state: State, first: jax.Array, count: int) -> jax.Array:
    """key[b,count]: of positions first[b] and on, whatever the other rows are."""
    at = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    return jax.vmap(row_keys, (None, None, 1), 1)(state["seed"], state["row"], at)


def alphas(state: State, first: jax.Array, count: int) -> jax.Array:
    """f32[b,count,1]: a cascade's alpha at positions first[b] and on; past what it is certified for none is kept."""
    own, at = state["cascade"], first[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    within = at - own["begun"][:, None] < own["until"]
    return jnp.where(within, own["alpha"], deferral.LOSSLESS)[:, :, None]


def _has_q(proposal: Proposal, count: int) -> jax.Array:
    """bool[b,count]: positions that the drafter has a distribution for."""
    assert proposal.beyond is not None
    return jnp.arange(count)[None, :] < (proposal.count + proposal.beyond)[:, None]


def _wanted(state: State) -> jax.Array:
    """i32[b]: drafts to verify: no more than there is room for before the token after them."""
    return jnp.minimum(state["proposal"].count, state["left"] - 1)


def _active(state: State) -> jax.Array:
    return ~state["done"] & (state["left"] > 0)


def _drafting(state: State) -> jax.Array:
    """bool[]: whether some row goes on drafting after this round, as far as is known before it."""
    return jnp.any(_active(state) & state["table"].active & (state["left"] > 1))


def _written(rows: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """rows[b,S,...] with new[b,n,...] from at[b] on."""
    rest = (0,) * (rows.ndim - 2)
    return jax.vmap(lambda row, part, i: lax.dynamic_update_slice(row, part, (i, *rest)))(rows, new, at)


def _row_at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, i: row[i])(x, index)


def _features(state: State, others: Sequence[jax.Array], before: jax.Array) -> Mapping[str, Any]:
    """What the target gave beside logits, kept for the drafter: row i is that of token i."""
    if not others:
        return {}
    return {"features": _written(state["features"], others[0], before)}
