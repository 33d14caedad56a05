"""One round of speculative decoding: which drafts stand, what follows them, how much of that is emitted.

p is the distribution to draw from: the target's own, or what a cascade makes of both. q is the one that
drafts were really drawn from, after the same temperature and filters. Then every token emitted is
distributed as p, whatever q is. Shapes: b rows, G drafts a row, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from effc.errors import EffcError
from effc.runtime.cache import Cache, Rows
from effc.runtime.kernels import on_tpu
from effc.runtime.sampling import Numbers, choose, filtered, penalize

NONE = -1
"""Stands for no token."""


@dataclass(frozen=True)
class Verdict:
    """accepted i32[b]: drafts that stand, from the first on; following i32[b]: the token after them."""

    accepted: jax.Array
    following: jax.Array


def agreed(chosen: jax.Array, drafts: jax.Array, count: jax.Array) -> Verdict:
    """For drafts that are no draw: chosen i32[b,G+1] is what the target takes after each, drafts i32[b,G].

    Where `chosen` is drawn from p this is rejection sampling with q all on the draft: it stands with
    probability p(draft), else what follows is drawn from p without it.
    """
    accepted = _leading((drafts == chosen[:, :-1]) & _first(count, drafts.shape[1]))
    return Verdict(accepted, _at(chosen, accepted))


def reviewed(p: jax.Array, q: jax.Array, drafts: jax.Array, count: jax.Array, keys: jax.Array) -> Verdict:
    """For drafts i32[b,G] drawn from q f32[b,G,V]: p is f32[b,G+1,V], keys[b,G+1] are each position's own.

    Only the first count[b] drafts are there. After the last of them `following` is drawn from p itself.
    """
    there = _first(count, drafts.shape[1])
    chance = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1))))(keys[:, :-1])
    ok = chance * _of(q, drafts) < _of(p[:, :-1], drafts)
    accepted = _leading(ok & there)
    beyond = jnp.pad(jnp.where(there[:, :, None], q, 0), ((0, 0), (0, 1), (0, 0)))
    draw = jax.vmap(lambda key: jax.random.fold_in(key, 2))(_at(keys, accepted))
    return Verdict(accepted, _drawn(_at(p, accepted), _at(beyond, accepted), draw))


def _drawn(p: jax.Array, q: jax.Array, keys: jax.Array) -> jax.Array:
    """i32[b]: a token of the residual of each row [b,V]; on TPUs a kernel draws the same."""
    if on_tpu.wanted():
        from effc.runtime.kernels.acceptance import reference, tpu  # Pallas takes half a second to import

        if tpu.fits(p, q, keys):
            return on_tpu.either(tpu.draw, reference.draw, p, q, jax.random.key_data(keys))
    return jax.vmap(jax.random.categorical)(keys, jnp.log(residual(p, q))).astype(jnp.int32)


def residual(p: jax.Array, q: jax.Array) -> jax.Array:
    """norm(max(0, p - q)) along the last axis; p itself where nothing is left, which is never drawn from."""
    left = jnp.maximum(p - q, 0)
    total = left.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, left / jnp.where(total > 0, total, 1), p)


def probabilities(logits: jax.Array, numbers: Numbers, filters: frozenset[str]) -> jax.Array:
    """f32, of logits[...,V] after temperature and filters."""
    rows = logits.astype(jnp.float32).reshape(-1, logits.shape[-1]) / numbers["temperature"]
    return jax.nn.softmax(filtered(rows, numbers, filters), axis=-1).reshape(logits.shape)


def chosen_at(
    logits: jax.Array, seen: jax.Array | None, keys: jax.Array, numbers: Numbers, *, greedy: bool,
    filters: frozenset[str],
) -> jax.Array:  # fmt: skip
    """i32[b,n]: a token for each of logits[b,n,V], as plain decoding chooses it with that key."""
    b, n, vocab = logits.shape
    flat = None if seen is None else seen.reshape(b * n, vocab)
    token = choose(logits.reshape(b * n, vocab), flat, keys.reshape(b * n), numbers, greedy=greedy, filters=filters)
    return token.reshape(b, n)


def penalized(logits: jax.Array, seen: jax.Array | None, numbers: Numbers) -> jax.Array:
    """Logits with the repetition penalty where `seen` is kept."""
    return logits if seen is None else penalize(logits, seen, numbers["repetition_penalty"])


def seen_after(seen: jax.Array | None, drafts: jax.Array) -> jax.Array | None:
    """bool[b,G+1,V]: tokens so far before each position, drafts i32[b,G] before it among them."""
    if seen is None:
        return None
    rows = [seen]
    for i in range(drafts.shape[1]):
        rows.append(with_token(rows[-1], drafts[:, i]))
    return jnp.stack(rows, axis=1)


def with_token(seen: jax.Array, token: jax.Array) -> jax.Array:
    """bool[b,V] with token[b] marked."""
    return seen | (token[:, None] == jnp.arange(seen.shape[-1])[None, :])


@dataclass(frozen=True)
class Emission:
    """tokens i32[b,G+1], the first count[b] of them emitted; ended bool[b]: the last of those ends the text."""

    tokens: jax.Array
    count: jax.Array
    ended: jax.Array

    def shown(self) -> jax.Array:
        """Tokens of the text: NONE for what is not emitted and for the token that ends it."""
        index = jnp.arange(self.tokens.shape[1])[None, :]
        return jnp.where(index < (self.count - self.ended)[:, None], self.tokens, NONE)

    def last(self, before: jax.Array) -> jax.Array:
        """i32[b]: the last emitted, or the token before."""
        return jnp.where(self.count > 0, _at(self.tokens, jnp.maximum(self.count - 1, 0)), before)


def emission(verdict: Verdict, drafts: jax.Array, stops: jax.Array, left: jax.Array) -> Emission:
    """What of the drafts and the token after them is emitted: left[b] at most, up to one of stops[n]."""
    index = jnp.arange(drafts.shape[1] + 1)[None, :]
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    tokens = jnp.where(index == verdict.accepted[:, None], verdict.following[:, None], padded)
    stop = jnp.any(tokens[:, :, None] == stops[None, None, :], axis=-1)
    until = jnp.where(stop.any(axis=1), jnp.argmax(stop, axis=1), drafts.shape[1]) + 1
    count = jnp.minimum(jnp.minimum(verdict.accepted + 1, until), left)
    ended = stop.any(axis=1) & (count == until)
    return Emission(tokens, count.astype(jnp.int32), ended)


def rolled_back(cache: Cache, lengths: jax.Array) -> Cache:
    """The cache with sequences of these lengths, none longer than it is."""
    check_rolls_back(cache)
    return replace(cache, lengths=lengths)


def check_rolls_back(cache: Cache) -> None:
    """EffcError where what a token left behind cannot be taken back."""
    for at, entry in enumerate(cache.entries):
        if not isinstance(entry, Rows):  # pyright: ignore[reportUnnecessaryIsInstance]
            kind = type(entry).__name__
            raise EffcError(f"draft: cache entry {at} is a {kind}, which cannot be rolled back, want rows a token")


def _leading(ok: jax.Array) -> jax.Array:
    """i32[b]: how many of ok[b,G] hold before the first that does not."""
    return jnp.cumprod(ok.astype(jnp.int32), axis=1).sum(axis=1)


def _first(count: jax.Array, size: int) -> jax.Array:
    """bool[b,size]: the first count[b]."""
    return jnp.arange(size)[None, :] < count[:, None]


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b,index[b],...]."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _of(probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """probs[b,G,V] of tokens[b,G]."""
    return jnp.take_along_axis(probs, tokens[:, :, None], axis=-1)[:, :, 0]
