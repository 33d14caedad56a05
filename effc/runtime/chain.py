"""Drafts made one token after another by a model beside the target, or by a part of it.

Three sorts share this loop. A model reads tokens alone. A head reads, with each token, what the target
made of the one before (its features), and goes on from features of its own. A part of the target reads
and writes the target's own cache, which verification then writes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effc.runtime import deferral, speculate
from effc.runtime.cache import Cache, empty_cache
from effc.runtime.drafting import Choice, Proposal, State, Widths, alphas, position_keys
from effc.runtime.exits import likeliest
from effc.runtime.sampling import Numbers

BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""The level of a draft token is how many of these the greatest probability reaches."""

PRIOR = (0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.65, 0.7, 0.8, 0.85, 0.9)
"""How often a token of each level is right, before anything was measured."""

PROMPT = 64
"""Tokens of a prompt read at a time."""

NEXT = 0.6
"""How often a token after drafts that are right is right, before it is made."""

FEW = 8
"""Tokens of which it is cheaper to have all logits than to stop at the last layer for which row is the last."""

Own = dict[str, Any]
"""cache; sure i32[b], rows of it that hold what was really said; said, what a draft is chosen by: logits f32[b,V'] or
the likeliest i32[b] and how likely it is, f32[b]; feature [b,d] of a head."""

Said = tuple[jax.Array, ...]
"""As above, of every row [b,n,...]."""


@dataclass(frozen=True)
class Ahead:
    """What is said after each row of a verification, and a cache that holds them all; fits bool[b]: rows of which it
    begins where they end."""

    made: dict[str, Any]
    cache: Cache
    fits: jax.Array


@dataclass(frozen=True)
class Chain:
    """entry(params, tokens, [features,] cache, valid) -> (logits, [features,] cache).

    floor, onward: how likely drafts must be right to their end for being sent, and for one more to be made.
    ids: name of the parameter with the target's number of each of its tokens, if it has fewer;
    shared: how many cache entries are the target's own; features: whether it is a head. rule: a cascade's, which
    needs q of the token after the drafts too; alone: drafts as long as the rule keeps them, whatever pays.
    """

    entry: Callable[..., Any]
    widths: Widths
    floor: float
    onward: float
    context: int | None = None
    ids: str = ""
    shared: int = 0
    features: bool = False
    rule: str = ""
    alone: bool = False
    draws = True

    @property
    def most(self) -> int:
        """Tokens drawn at most: those sent, and in a cascade one more."""
        return self.widths.most + bool(self.rule)

    @property
    def reads(self) -> int:
        """Tokens that one call reads between rounds."""
        return 1 if self.shared else self.widths.most + 1 if self.features else 2

    def plain(self, choice: Choice) -> bool:
        """Whether the likeliest token, and how likely it is, are all that is asked of logits."""
        return choice.greedy and not choice.filters and not self.rule

    def begin(self, params: Any, rows: int, room: int, features: jax.Array | None, choice: Choice) -> Own:
        """Nothing read yet; features [b,n,d] only tell their width and dtype."""
        operands = [] if features is None else [features[:, :1]]
        shapes = jax.eval_shape(self.entry, params, jnp.zeros((rows, 1), jnp.int32), *operands)
        zero = jnp.zeros(rows, jnp.int32)
        own: Own = {
            "cache": empty_cache(shapes[-1], room) if not self.shared else Cache(zero, ()),
            "sure": jnp.zeros(rows, jnp.int32),
            "said": (zero, zero * 0.0) if self.plain(choice) else (jnp.zeros((rows, shapes[0].shape[-1])),),
        }
        return own | ({"feature": jnp.zeros_like(features[:, 0])} if features is not None else {})

    def ahead(
        self, params: Any, state: State, choice: Choice, chosen: jax.Array, others: Sequence[jax.Array]
    ) -> Ahead | None:
        """A head reads what the target chooses after each token: where drafts stand, that is the text itself."""
        if not (self.features and self.plain(choice)):
            return None
        own = self._opened(state)
        made, cache = self._made(params, state, choice, chosen, others[0], own["cache"])
        return Ahead(made, cache, own["cache"].lengths == state["cache"].lengths)

    def propose(
        self, params: Any, state: State, numbers: Numbers, choice: Choice, first: bool = False,
        ahead: Ahead | None = None,
    ) -> tuple[Proposal, State]:  # fmt: skip
        """Reads what is new, then drafts while the chance that all is right stays worth it."""
        going = ~state["done"] & (state["left"] > 0)
        pays = going & (state["left"] > 1) & (self.alone | state["table"].active)
        rows, size = going if self.rule else pays, PROMPT if first else self.reads
        if self.context is not None:  # padding must not run past a table of positions
            rows &= state["cache"].lengths + 1 + max(size, self.most) <= self.context
        own = self._opened(state)
        own = own if ahead is None else self._taken(own, ahead, state, rows)
        own = self._read(params, own, state, rows, size, choice)
        own["sure"] = own["cache"].lengths
        draft = _Draft(self, params, state, numbers, choice)
        proposal, own = draft.run(own, rows, pays & rows)
        return proposal, self._closed(state, own)

    def _opened(self, state: State) -> Own:
        """With the cache cut to what was really said; a part of the target takes the target's."""
        own, lengths = dict(state["own"]), state["cache"].lengths
        if self.shared:
            own["cache"] = Cache(lengths, state["cache"].entries[: self.shared])
        else:
            own["cache"] = speculate.rolled_back(own["cache"], jnp.minimum(own["sure"], lengths))
        return own

    def _closed(self, state: State, own: Own) -> State:
        """Drafts that a model read stay read as far as they are accepted; a head reads them again."""
        cache = own["cache"]
        assert isinstance(cache, Cache)
        if self.shared:
            target = Cache(state["cache"].lengths, (*cache.entries, *state["cache"].entries[self.shared :]))
            return {**state, "cache": target, "own": {**own, "cache": Cache(cache.lengths, ())}}
        return {**state, "own": own if self.features else {**own, "sure": cache.lengths}}

    def _read(self, params: Any, own: Own, state: State, rows: jax.Array, size: int, choice: Choice) -> Own:
        """Tokens that are known and not yet read, `size` at a time: mostly once, or not at all."""
        skip = int(self.features)  # a head reads token i+1 with the features of token i

        def lag(own: Own) -> jax.Array:
            return jnp.where(rows, self._lag(own, state), 0)

        def read(own: Own) -> Own:
            at = own["cache"].lengths
            tokens = jnp.maximum(_rows(state["history"], at + skip, size), 0)
            operands = [_rows(state["features"], at, size)] if self.features else []
            valid = jnp.clip(lag(own), 0, size)
            if size > FEW:
                made, cache = self._made(params, state, choice, tokens, *operands, own["cache"], valid)
                return self._grown(own, made, cache, valid > 0)
            made, cache = self._made(params, state, choice, tokens, *operands, own["cache"])
            return self._kept(own, made, cache, valid)

        return lax.while_loop(lambda own: jnp.any(lag(own) > 0), read, own)

    def _lag(self, own: Own, state: State) -> jax.Array:
        """i32[b]: tokens known and not yet read."""
        return state["cache"].lengths + 1 - int(self.features) - own["cache"].lengths

    def _taken(self, own: Own, ahead: Ahead, state: State, rows: jax.Array) -> Own:
        """With what was made ahead, of rows that had read all there was."""
        return self._kept(own, ahead.made, ahead.cache, jnp.where(rows & ahead.fits, self._lag(own, state), 0))

    def _kept(self, own: Own, made: dict[str, Any], cache: Cache, valid: jax.Array) -> Own:
        """With the first valid[b] rows of what was made from where `own` ends."""
        last = jax.tree.map(lambda x: _rows(x, jnp.maximum(valid - 1, 0), 1), made)
        lengths = own["cache"].lengths + valid
        return self._grown(own, last, speculate.rolled_back(cache, lengths), valid > 0)

    def step(self, params: Any, own: Own, state: State, choice: Choice, token: jax.Array) -> Own:
        """After one draft token more."""
        operands = [own["feature"][:, None]] if self.features else []
        made, cache = self._made(params, state, choice, token[:, None], *operands, own["cache"])
        return self._grown(own, made, cache, jnp.ones(token.shape, bool))

    def _made(self, params: Any, state: State, choice: Choice, *operands: Any) -> tuple[dict[str, Any], Cache]:
        """What is said of every row, and features of a head; and the cache after."""
        logits, *others, cache = self.entry(params, *operands)
        made: dict[str, Any] = {"said": self._said(logits, state, choice)}
        return made | ({"feature": others[0]} if self.features else {}), cache

    def _said(self, logits: jax.Array, state: State, choice: Choice) -> Said:
        if not self.plain(choice):
            return (logits.astype(jnp.float32),)
        # What a table is padded with is no token: the target would read past its own.
        vocab = state["vocab"].shape[0]
        logits = logits[..., :vocab] if logits.shape[-1] > vocab else logits
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), likeliest(logits)

    def _grown(self, own: Own, made: dict[str, Any], cache: Cache, rows: jax.Array) -> Own:
        """With the last row of what was made, for `rows`."""

        def last(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(rows.reshape(rows.shape + (1,) * (old.ndim - 1)), new[:, -1], old)

        before = {name: own[name] for name in made}
        return {**own, **jax.tree.map(last, made, before), "cache": cache}


@dataclass(frozen=True)
class _Draft:
    """One draft under way. Whether token i is drafted depends on what comes before it alone, never on itself:
    else tokens kept would not be drawn from q."""

    chain: Chain
    params: Any
    state: State
    numbers: Numbers
    choice: Choice

    def run(self, own: Own, rows: jax.Array, on: jax.Array) -> tuple[Proposal, Own]:
        """Drafts of the rows that are `on`; in a cascade q of the next token of all rows[b]."""
        most, b, old = self.chain.most, rows.shape[0], self.state["proposal"]
        nothing, beyond = jnp.zeros((b, most), jnp.int32), rows if self.chain.rule else None
        q = None if self.choice.greedy else jnp.zeros_like(old.q)
        mine = None if old.own is None else jnp.zeros_like(old.own)
        carry = {
            "i": jnp.int32(0), "own": own, "reach": jnp.ones(b), "on": on, "seen": self.state["seen"],
            "proposal": Proposal(nothing, nothing, jnp.where(on, 1, 0), nothing[:, 0], q, beyond, mine),
        }  # fmt: skip
        carry = self._drawn(carry)

        def going(carry: dict[str, Any]) -> jax.Array:
            return (carry["i"] < most) & jnp.any(carry["on"])

        def turn(carry: dict[str, Any]) -> dict[str, Any]:
            last = lax.dynamic_index_in_dim(carry["proposal"].tokens, carry["i"] - 1, 1, keepdims=False)
            own = self.chain.step(self.params, carry["own"], self.state, self.choice, last)
            # Rows that have stopped keep their cache's length, whatever was written past it.
            lengths = jnp.where(carry["on"], own["cache"].lengths, carry["own"]["cache"].lengths)
            own["cache"] = speculate.rolled_back(own["cache"], lengths)
            return self._drawn({**carry, "own": own})

        carry = lax.while_loop(going, turn, carry)
        return carry["proposal"], carry["own"]

    def _drawn(self, carry: dict[str, Any]) -> dict[str, Any]:
        """With token i, of rows for which it is worth drafting."""
        i, proposal = carry["i"], carry["proposal"]
        said: Said = carry["own"]["said"]
        level = _level(said[1] if self.chain.plain(self.choice) else likeliest(said[0]))
        chance = jnp.take_along_axis(self.state["table"].chances, level[:, None], axis=1)[:, 0]
        reach = carry["reach"] * chance
        own = None if proposal.own is None else self._own(said[0], carry["seen"], proposal.own.shape[-1])
        sent = carry["on"] & (self._keeps(own, i) if self.chain.alone else reach >= self.chain.floor)
        sent &= i < self.chain.widths.most
        token, q, seen = self._token(said[0], carry)
        proposal = Proposal(
            _put(proposal.tokens, token, i), _put(proposal.levels, level, i),
            jnp.maximum(proposal.there, jnp.where(sent, i + 1, 0)), proposal.count + sent,
            None if q is None or proposal.q is None else _put(proposal.q, q, i), proposal.beyond,
            None if own is None or proposal.own is None else _put(proposal.own, own, i),
        )  # fmt: skip
        on = sent if self.chain.alone else sent & (reach >= self.chain.onward)
        return {**carry, "i": i + 1, "reach": reach, "on": on, "proposal": proposal, "seen": seen}

    def _own(self, logits: jax.Array, seen: jax.Array | None, size: int) -> jax.Array:
        """f32[b,size]: the drafter's own probabilities, or the largest of them."""
        own = jax.nn.softmax(speculate.penalized(self._whole(logits), seen, self.numbers), axis=-1)
        return own if size > 1 else own.max(axis=-1, keepdims=True)

    def _keeps(self, own: jax.Array | None, i: jax.Array) -> jax.Array:
        """bool[b]: whether the rule, which must not need p, keeps token i."""
        assert own is not None
        alpha = alphas(self.state, self.state["cache"].lengths + 1 + i, 1)[:, 0]
        nothing = jnp.zeros_like(own)
        return deferral.RULES[self.chain.rule](deferral.Own(nothing, own, nothing), alpha)[:, 0]

    def _token(self, said: jax.Array, carry: dict[str, Any]) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """The token, the q it was drawn from, and the tokens seen with it; said is what goes by, logits or itself."""
        seen = carry["seen"]
        if self.chain.plain(self.choice):
            return (self._ids()[said] if self.chain.ids else said), None, seen
        whole = speculate.penalized(self._whole(said), seen, self.numbers)
        if self.choice.greedy:
            token, q = jnp.argmax(whole, axis=-1).astype(jnp.int32), None
        else:
            q = speculate.probabilities(whole, self.numbers, self.choice.filters)
            first = self.state["cache"].lengths + 1 + carry["i"]
            keys = position_keys(self.state, first, 1)[:, 0]
            draw = jax.vmap(lambda key: jax.random.fold_in(key, 3))(keys)
            token = jax.vmap(jax.random.categorical)(draw, jnp.log(q)).astype(jnp.int32)
        return token, q, None if seen is None else speculate.with_token(seen, token)

    def _ids(self) -> jax.Array:
        return self.params[self.chain.ids]

    def _whole(self, logits: jax.Array) -> jax.Array:
        """Over the target's vocabulary: what the drafter has no token for is never drafted."""
        vocab = self.state["vocab"].shape[0]
        if self.chain.ids:
            nothing = jnp.full((logits.shape[0], vocab), -jnp.inf)
            return nothing.at[:, self._ids()].set(logits)
        short = max(0, vocab - logits.shape[-1])
        return jnp.pad(logits[:, :vocab], ((0, 0), (0, short)), constant_values=-jnp.inf)


def _level(best: jax.Array) -> jax.Array:
    """i32[b]: how sure the drafter is, of how likely its likeliest token is."""
    return sum(((best >= bound).astype(jnp.int32) for bound in BOUNDS), jnp.zeros(best.shape, jnp.int32))


def _put(x: jax.Array, column: jax.Array, i: jax.Array) -> jax.Array:
    """x[b,G,...] with column[b,...] at i."""
    return lax.dynamic_update_index_in_dim(x, column.astype(x.dtype), i, 1)


def _rows(x: jax.Array, at: jax.Array, size: int) -> jax.Array:
    """x[b,at[b]:at[b]+size,...]; x is long enough, with zeros past what is known."""
    rest = x.shape[2:]
    return jax.vmap(lambda row, i: lax.dynamic_slice(row, (i, *(0,) * len(rest)), (size, *rest)))(x, at)
