"""Leaving a stack of layers early: when a token is sure enough, and what the layers it skips still keep.

A token that leaves keeps its state x through the layers it skips; each of these still makes keys and values of x, so
that later tokens find them (state propagation). Or, deferred, it runs them later, beside a token that does not leave:
what later tokens find is then the full model's. Or, shared, layers after the exit make keys and values of the state
there in any case: what later tokens find is the same whether a token left or not. With a cache and one token a
sequence, layers that no row needs do not run. Otherwise all layers run and rows that have left are masked: the same
numbers, nothing saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effc.runtime.cache import Cache, Entry, Step
from effc.runtime.deferred import Behind, Waiting, last
from effc.runtime.kernels.region.branch import either
from effc.runtime.kernels.region.record import recorded
from effc.runtime.kernels.vocabulary.reference import Top, of_logits

State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""x[b,t,d]; what is shown so far, logits [b,t,V] (or their likeliest token, i32[b,t]) or, where the measure needs
none, states [b,t,d]; left f32[b,t], 1 where a token has left; layers f32[b,t] that each ran. Flags are floats, as
native regions have them."""

FROM_LOGITS = frozenset({"softmax", "softmax_max"})
"""Measures that need the head at every exit."""


@dataclass(frozen=True)
class Stack:
    """layers and exits: parameters of each; run(p,x,step,*rest) and leave(p,x) give states, head(x) logits.

    keep(p,x,step) does of run only what later tokens see. `leave` gives the classifier's score [b,t,1] too where
    that is the measure. best(x): the likeliest tokens of head(x), where they can be had without it.
    """

    layers: Sequence[Any]
    exits: Sequence[Any]
    run: Callable[..., jax.Array]
    keep: Callable[[Any, jax.Array, Step], Any]
    leave: Callable[[Any, jax.Array], Any]
    head: Callable[[jax.Array], jax.Array]
    best: Callable[[jax.Array], Top] | None = None
    after: Callable[..., jax.Array] | None = None
    """Shared: after(p,x,step,s), a layer after the exit, where the state was s."""
    say: Callable[[jax.Array], jax.Array] | None = None
    """The head at exits, where it is not `head`; `tell` is to it what `best` is to that."""
    tell: Callable[[jax.Array], Top] | None = None

    def top(self, x: jax.Array) -> Top:
        """The likeliest tokens of head(x), and how likely, each [b,t]."""
        if self.best is not None:
            return self.best(x)
        logits = self.head(x)
        return of_logits(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape[:-1])

    def at_exit(self) -> Stack:
        """With the head that exits have."""
        return self if self.say is None else replace(self, head=self.say, best=self.tell)


@dataclass(frozen=True)
class Rule:
    """at: layers that run before each exit; a token leaves where its confidence reaches the threshold.

    threshold f32[b,1] is 1 where nobody leaves. rows: each by itself (`masked`), or all when the least sure is
    sure enough (`wait`). likeliest: what is shown of logits is their likeliest token.
    """

    at: tuple[int, ...]
    measure: str
    threshold: jax.Array
    rows: str
    waiting: int = 0
    """Deferred: so many tokens may wait for the layers they left out. 0: these keep what x gives them."""
    rest: tuple[jax.Array, ...] = ()
    """Deferred: what layers read beside x of each token, [b,t,...]."""
    likeliest: bool = False


def early(
    step: Step, x: jax.Array, stack: Stack, *, at: tuple[int, ...], measure: str = "softmax",
    threshold: Any = 1.0, progress: Any = None, rows: str = "masked", decay: str = "none", tau: float = 4.0,
    waiting: int = 0, rest: tuple[jax.Array, ...] = (), likeliest: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Logits [b,t,V] of where each token left, and how many layers it ran before, i32[b,t].

    progress f32[b]: how much of the text is written, 0 to 1; it lowers the threshold where that decays.
    likeliest: in place of logits their likeliest token, i32[b,t]; on TPUs the logits are then written nowhere.
    """
    done = jnp.zeros(x.shape[0], jnp.float32) if progress is None else progress
    rule = Rule(at, measure, decayed(threshold, done, decay, tau)[:, None], rows, waiting, rest, likeliest)
    none = jnp.zeros(x.shape[:2], jnp.float32)
    before = step.taken
    state = _segment(stack, rule, 0, (x, x, none, none), step, alone=True)  # all are shown to the first exit
    entries = (step.taken - before) // at[0]  # of each layer
    if waiting and step.cached and x.shape[1] == 1:
        state = _deferring(stack, rule, state, step, entries)
        return _told(stack, rule, state)
    for i in range(1, len(at) + 1):
        if step.cached and x.shape[1] == 1:
            state = _skipping(stack, rule, i, state, step, entries)
        else:
            state = _segment(stack, rule, i, state, step)
    return _told(stack, rule, state)


def _told(stack: Stack, rule: Rule, state: State) -> tuple[jax.Array, jax.Array]:
    _, shown, _, layers = state
    return (shown if rule.measure in FROM_LOGITS else _said(stack, rule, shown)), layers.astype(jnp.int32)


def _said(stack: Stack, rule: Rule, x: jax.Array) -> jax.Array:
    """Logits, or the likeliest token."""
    return stack.top(x).token if rule.likeliest else stack.head(x)


def _bounds(stack: Stack, rule: Rule, i: int) -> tuple[int, int]:
    """Layers start..stop-1 are the i-th segment."""
    cuts = (0, *rule.at, len(stack.layers))
    return cuts[i], cuts[i + 1]


def _segment(stack: Stack, rule: Rule, i: int, state: State, step: Step, *, alone: bool = False) -> State:
    """The layers up to the i-th exit, or to the end, and who leaves there; `alone` where nobody has left yet."""
    x, shown, left, layers = state
    start, stop = _bounds(stack, rule, i)
    before, goes_on = x, alone or rule.waiting > 0
    run, rest = (stack.run, rule.rest) if stack.after is None or not i else (stack.after, (x,))
    for p in stack.layers[start:stop]:
        before, x = x, _kept(left, x, run(p, x, step, *rest), goes_on)
    layers = _kept(left, layers, jnp.full_like(layers, stop), alone)
    if i == len(rule.at):
        return x, _kept(left, shown, _final(stack, rule, x), alone), left, layers
    seen, sure = _seen(stack, rule, i, x, before)
    shown = _kept(left, shown, seen, alone)
    return x, shown, _leaves(rule, left, sure, alone), layers


def _final(stack: Stack, rule: Rule, x: jax.Array) -> jax.Array:
    """What is shown after all layers."""
    return _said(stack, rule, x) if rule.measure in FROM_LOGITS else x


def _kept(left: jax.Array, old: jax.Array, new: jax.Array, alone: bool) -> jax.Array:
    return new if alone else select(left, old, new)


def _seen(stack: Stack, rule: Rule, i: int, x: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is shown of tokens that leave at the i-th exit, and how sure they are, f32[b,t]."""
    out = stack.leave(stack.exits[i], x)
    if rule.measure == "classifier":
        out, score = out
        return out, jax.nn.sigmoid(score[..., 0].astype(jnp.float32))
    if rule.measure == "state":
        return out, similarity(x, before)
    stack = stack.at_exit()
    if rule.likeliest:
        top = stack.top(out)
        return top.token, top.margin() if rule.measure == "softmax" else top.likeliest()
    logits = stack.head(out)
    return logits, (margin if rule.measure == "softmax" else likeliest)(logits)


def _leaves(rule: Rule, left: jax.Array, sure: jax.Array, alone: bool) -> jax.Array:
    """f32[b,t], 1 where a token has left: now, or before."""
    enough = reached(sure, rule.threshold)
    now = enough if alone else jnp.maximum(enough, left)
    if rule.rows == "wait" and sure.shape[0] > 1:
        return jnp.broadcast_to(jnp.min(now, axis=0, keepdims=True), now.shape)
    return now


def _skipping(stack: Stack, rule: Rule, i: int, state: State, step: Step, entries: int) -> State:
    """The i-th segment where a row needs it, else only what its layers keep."""
    start, stop = _bounds(stack, rule, i)
    cache = Cache(step.lengths, step.ahead(entries * (stop - start)))
    alone = state[0].shape[0] == 1 or rule.rows == "wait"  # where a row goes on, all do

    def on(carry: Carry) -> Carry:
        state, entries = carry
        part = Step(state[0], Cache(cache.lengths, entries))
        state = _segment(stack, rule, i, state, part, alone=alone)
        return state, part.cache().entries

    def off(carry: Carry) -> Carry:
        state, entries = carry
        part = Step(state[0], Cache(cache.lengths, entries))
        for p in stack.layers[start:stop]:
            stack.keep(p, state[0], part)
        return state, part.cache().entries

    state, grown = either(state[2], on, off, (state, cache.entries))
    step.put(grown)
    return state


Carry = tuple[State, tuple[Entry, ...]]


def _deferring(stack: Stack, rule: Rule, state: State, step: Step, entries: int) -> State:
    """The layers after the exit where a row needs them or too many tokens wait, on these too; else one waits more."""
    x, shown, left, layers = state
    count = entries * (len(stack.layers) - rule.at[0])
    ahead, values = step.ahead(count + 1), (x, *rule.rest)
    waiting = ahead[count] if len(ahead) > count else Waiting.none(values, rule.waiting)
    assert isinstance(waiting, Waiting)
    stays, waiting = left * waiting.other(waiting.most), waiting.joined(values)
    carry = (shown, layers, ahead[:count])
    for size in range(waiting.most + 1):  # a call is traced for each: so many tokens run beside the new one
        skipped = jnp.maximum(stays, waiting.other(size))
        rows = waiting.rows(size + 1) if size else list(values)
        run = _catching_up(stack, rule, Behind.of(step, size), left, rows)
        carry = either(skipped, run, lambda carry: carry, carry)
    shown, layers, grown = carry
    step.put((*grown, waiting.after(stays)))
    return x, shown, left, layers


Shown = tuple[jax.Array, jax.Array, tuple[Entry, ...]]
"""What is shown, layers, and what layers keep."""


def _catching_up(
    stack: Stack, rule: Rule, behind: Behind, left: jax.Array, rows: Sequence[jax.Array]
) -> Callable[[Shown], Shown]:
    """The layers after the exit on rows [b,n,...], the last of which is the new token's."""

    def run(carry: Shown) -> Shown:
        shown, layers, entries = carry
        x, *rest = rows
        part = behind.step(x, entries)
        for p in stack.layers[rule.at[0] :]:
            x = stack.run(p, x, part, *rest)
        shown = select(left, shown, _final(stack, rule, last(x)))
        layers = select(left, layers, jnp.full_like(layers, len(stack.layers)))
        return shown, layers, part.cache().entries

    return run


@recorded
def select(flags: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """Rows [b,t,...] of `yes` where flags f32[b,t] are other than 0, else of `no`."""
    return jnp.where(flags.reshape(flags.shape + (1,) * (yes.ndim - 2)) != 0, yes, no)


@recorded
def reached(sure: jax.Array, threshold: jax.Array) -> jax.Array:
    """f32[b,t], 0 or 1; a threshold f32[b,1] of 1 lets nobody leave, not even one who is sure to the last bit."""
    return ((sure >= threshold) & (threshold < 1)).astype(jnp.float32)


# -- confidence, in [0,1] -----------------------------------------------------------------------------------


@recorded
def margin(logits: jax.Array) -> jax.Array:
    """Probability of the likeliest token less that of the next, f32 without the last axis.

    By two maxima: a sort of the vocabulary takes longer than several layers.
    """
    logits = logits.astype(jnp.float32)
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(best.dtype, logits.shape, logits.ndim - 1)
    others = jnp.where(index == best, -jnp.inf, logits)
    top = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    return (1 - jnp.exp(jnp.max(others, axis=-1) - top)) / total


@recorded
def likeliest(logits: jax.Array) -> jax.Array:
    """Probability of the likeliest token."""
    logits = logits.astype(jnp.float32)
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def similarity(x: jax.Array, before: jax.Array) -> jax.Array:
    """Cosine of a layer's state and the one it was given; 0 where that is negative."""
    x, before = x.astype(jnp.float32), before.astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(x * x, axis=-1) * jnp.sum(before * before, axis=-1))
    return jnp.clip(jnp.sum(x * before, axis=-1) / jnp.maximum(norms, 1e-9), 0, 1)


def decayed(threshold: Any, progress: jax.Array, decay: str = "none", tau: float = 4.0) -> jax.Array:
    """The threshold of each row, in [0,1], when this much of the text is written; 1 stays 1.

    `paper`: 0.9 threshold + 0.1 exp(-tau progress); `t5x`: threshold (0.9 + 0.1 exp(-tau progress)).
    """
    given = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), progress.shape)
    falling = jnp.exp(-tau * progress.astype(jnp.float32)) / 10
    forms = {"none": given, "paper": 0.9 * given + falling, "t5x": given * (0.9 + falling)}
    return jnp.where(given >= 1, 1.0, jnp.clip(forms[decay], 0, 1))


__all__ = ["Rule", "Stack", "decayed", "early", "likeliest", "margin", "similarity"]
