"""What an emitted program's `DECODE` asks for: the drafter, its widths, and the state that its loop starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.errors import EffcError, nearest
from effc.runtime import chain, deferral, gain, lookup
from effc.runtime.cache import cache_shapes
from effc.runtime.chain import PROMPT, Chain
from effc.runtime.drafting import Choice, Drafter, Loop, Proposal, State, Widths, empty_tally, widths
from effc.runtime.lookup import Lookup
from effc.runtime.program import Program
from effc.runtime.speculate import NONE, check_rolls_back

SLOPE = 0.1
"""Cost of one more token in a call, in calls on one, where none was measured."""

COST = 0.1
"""Cost of a draft token, likewise."""

ALWAYS = 2**31 - 1

ROUND = 128
"""Histories hold a multiple of this many tokens, so that few shapes are compiled."""


@dataclass(frozen=True)
class Speculation:
    """A program's drafter: what its loop and its first state are made of."""

    program: Program
    drafter: Drafter
    widths: Widths
    prior: tuple[float, ...]
    verify: Callable[..., Any]
    cascade: Cascade | None = None

    @property
    def features(self) -> bool:
        """Whether the drafter reads what `verify` gives beside logits."""
        return isinstance(self.drafter, Chain) and self.drafter.features

    def loop(self, choice: Choice, rows: int) -> Loop:
        """The loop to compile for this way of choosing and so many sequences."""
        sizes = self.widths.at(rows)
        return Loop(self.verify, self._drafter(sizes), sizes, self.program.context, choice, self.rule)

    @property
    def rule(self) -> str:
        """A cascade's; nothing where what is drawn is the target's own distribution."""
        return self.cascade.rule if self.cascade else ""

    def asking(self, alpha: float | None, threshold: float | None = None) -> Speculation:
        """With this alpha of its cascade, whatever is certified, or threshold where that is by token; None as it is."""
        if alpha is None and threshold is not None and self.cascade and self.cascade.alone:
            alpha = deferral.LOSSLESS if threshold >= 1 else 1 - threshold
        if alpha is None or self.cascade is None:
            return self
        return replace(self, cascade=replace(self.cascade, asked=alpha))

    def _drafter(self, sizes: Widths) -> Drafter:
        """The drafter that goes by these costs."""
        if isinstance(self.drafter, Chain):
            floor, onward = floors(sizes)
            return replace(self.drafter, widths=sizes, floor=floor, onward=onward)
        return replace(self.drafter, widths=sizes) if isinstance(self.drafter, Lookup) else self.drafter

    def begin(
        self, params: Any, state: State, prompts: Sequence[Sequence[int]], new: int, vocab: int,
        features: jax.Array | None, choice: Choice,
    ) -> State:  # fmt: skip
        """The state after the first token, with what speculation keeps beside; up to `new` tokens a row in all.

        features [b,n,d] are those of the prompts.
        """
        check_rolls_back(state["cache"])
        rows, greedy = len(prompts), choice.greedy
        most = self.drafter.most if isinstance(self.drafter, Chain) else self.widths.most
        room = max(map(len, prompts)) + new + max(most + 2, PROMPT)
        room = -(-room // ROUND) * ROUND
        left, nothing = jnp.full(rows, new - 1, jnp.int32), jnp.zeros((rows, most), jnp.int32)
        drawn = jnp.zeros((rows, most, vocab)) if self.drafter.draws and not greedy else None
        history = _history(prompts, room).at[jnp.arange(rows), state["cache"].lengths].set(state["token"])
        own = {
            "history": history, "left": left, "table": gain.begin(rows, self.prior),
            "tally": empty_tally(self.widths),
            "proposal": Proposal(nothing, nothing, left * 0, left * 0, drawn),
        }  # fmt: skip
        if self.cascade:
            size = deferral.wanted(self.rule, greedy, vocab)
            mine = jnp.zeros((rows, most, size)) if size else None
            own["proposal"] = replace(own["proposal"], beyond=jnp.zeros(rows, bool), own=mine)
            own["cascade"] = self.cascade.begin(state["cache"].lengths, choice)
        if isinstance(self.drafter, Chain):
            own |= {"own": self.drafter.begin(params, rows, room, features, choice), "vocab": jnp.zeros(vocab, bool)}
        if features is not None:
            own["features"] = jnp.pad(features, ((0, 0), (0, max(0, room - features.shape[1])), (0, 0)))
        return {**state, **jax.tree.map(jnp.copy, own)}  # no array twice: they are donated


@dataclass(frozen=True)
class Cascade:
    """A rule's alpha; certified: it holds for greedy text of up to so many tokens only, 0 where it was set by hand.

    alone: the drafter goes on as long as the rule keeps what it says. asked: alpha, whatever is certified.
    """

    rule: str
    alpha: float
    certified: int = 0
    alone: bool = False
    asked: float | None = None

    def begin(self, lengths: jax.Array, choice: Choice) -> State:
        """What the loop reads: other text than what alpha is certified for is the target's own."""
        by_hand = self.asked is not None or not self.certified
        holds = by_hand or (choice.greedy and not choice.filters)
        alpha = (self.alpha if self.asked is None else self.asked) if holds else deferral.LOSSLESS
        until = ALWAYS if by_hand else self.certified
        return {"alpha": jnp.float32(alpha), "begun": lengths, "until": jnp.int32(until)}


def _cascade(asked: Mapping[str, Any]) -> Cascade | None:
    """What `DECODE` says of one."""
    rule = str(asked.get("rule", ""))
    if not rule:
        return None
    if rule not in deferral.RULES:
        raise EffcError(f"decode: no rule '{rule}', want {' or '.join(deferral.RULES)}{nearest(rule, deferral.RULES)}")
    certified = int(asked.get("tokens", 0)) if "delta" in asked else 0
    return Cascade(rule, float(asked["alpha"]), certified, asked.get("strategy") == "cascade")


def speculation_of(program: Program, params: Any) -> Speculation | None:
    """What `DECODE` says; None where decoding is plain."""
    asked = program.decode
    if asked.get("strategy") not in ("speculative", "cascade") or asked.get("level") == "sequence":
        return None
    if asked.get("gamma") == 0:  # it was measured not to pay
        return None
    kind = str(asked.get("kind"))
    if kind not in KINDS:
        raise EffcError(f"decode: no drafter '{kind}', want {' or '.join(KINDS)}{nearest(kind, KINDS)}")
    return KINDS[kind](program, params, asked)


def _lookup(program: Program, params: Any, asked: Mapping[str, Any]) -> Speculation:
    if asked.get("rule"):
        raise EffcError("decode: kind=lookup has no distribution for a rule to weigh, want a drafter that draws")
    sizes = _widths(asked)
    prior = tuple(asked.get("acceptance", lookup.PRIOR))
    return Speculation(program, Lookup(sizes), sizes, prior, program.extend)


def _chain(program: Program, params: Any, asked: Mapping[str, Any]) -> Speculation:
    """A drafter that is a function of the program."""
    sizes, verify = _widths(asked), asked.get("verify")
    entry = _entry(program, str(asked.get("drafter")))
    entry = _uncounted(entry) if asked.get("kind") == "exits" else entry
    shared = _shared(program, entry, params) if asked.get("shared") else 0
    limits = [limit for limit in (program.context, asked.get("context")) if limit is not None]
    cascade = _cascade(asked)
    drafter = Chain(
        entry, sizes, *floors(sizes), min(limits, default=None),
        ids=str(asked.get("vocab", "")), shared=shared, features=verify is not None,
        rule=cascade.rule if cascade else "", alone=cascade is not None and cascade.alone,
    )  # fmt: skip
    whole = _entry(program, str(verify)) if verify is not None else program.extend
    return Speculation(program, drafter, sizes, tuple(asked.get("acceptance", chain.PRIOR)), whole, cascade)


KINDS: Mapping[str, Callable[[Program, Any, Mapping[str, Any]], Speculation]] = {
    "lookup": _lookup, "model": _chain, "self": _chain, "head": _chain, "exits": _chain,
}  # fmt: skip


def _shared(program: Program, entry: Callable[..., Any], params: Any) -> int:
    """How many entries of the target's cache a part of it has; EffcError where they are not the first ones."""
    part, whole = (cache_shapes(call, params, 1).entries for call in (entry, program.extend))
    if part != whole[: len(part)]:
        raise EffcError("decode: the drafter's cache is not the beginning of the target's, want its first layers")
    return len(part)


def _uncounted(early: Callable[..., Any]) -> Callable[..., Any]:
    """A function that tokens leave early, without the layers each ran."""

    def call(params: Any, tokens: jax.Array, cache: Any = None, valid: jax.Array | None = None) -> Any:
        logits, _, cache = early(params, tokens, cache, valid)
        return logits, cache

    return call


def _entry(program: Program, name: str) -> Callable[..., Any]:
    if name not in program.entries:
        raise EffcError(f"decode: the program has no function '{name}'{nearest(name, program.entries)}")
    return program.entries[name]


def _widths(asked: Mapping[str, Any]) -> Widths:
    gamma = int(asked["gamma"])
    curve = asked.get("curve") or [1 + SLOPE * n for n in range(gamma + 1)]
    cost = float(asked.get("cost", COST if "drafter" in asked else 0))
    many = (asked["curve8"], float(asked.get("cost8", cost))) if asked.get("curve8") else None
    return widths(gamma, curve, cost, many, max(1.0, float(asked.get("predicted", 1.0))))


def floors(sizes: Widths) -> tuple[float, float]:
    """How likely drafts must be right to their end to pay: sent as they are, and for one more, which costs too."""
    slope = (sizes.costs[-1] - sizes.costs[0]) / max(1, sizes.most)
    return sizes.rate * slope, sizes.rate * (slope + sizes.draft) / chain.NEXT


def _history(prompts: Sequence[Sequence[int]], room: int) -> jax.Array:
    """i32[b,room]: the prompts, nothing after them."""
    out = np.full((len(prompts), room), NONE, np.int32)
    for row, prompt in enumerate(prompts):
        out[row, : len(prompt)] = prompt
    return jnp.asarray(out)
