"""Reads texts and writes answers as the target would, in large batches, and notes what a drafter learns from.

What reads is the target with 4-bit weights: in native code, several times faster, and near what will be served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effc.ir.core import Module, Ref
from effc.passes.draft import head
from effc.passes.draft.lesson import FIELDS, TOP
from effc.passes.draft.model import int4
from effc.passes.draft.parts import cut
from effc.runtime.cache import Cache, empty_cache
from effc.runtime.kernels.region.native import packed, regions
from effc.runtime.speculate import rolled_back
from effc.weights import Store

if TYPE_CHECKING:
    from effc.passes.context import Context

WARM = 0.6
"""Temperature of every third answer; the others are greedy."""

GROUP = 64
"""Logits among which the greatest is sought first: sorting all of them takes longer than a step of the model."""

ROUND = 32
"""Prompts are padded to a multiple of this many tokens, so that few shapes are compiled."""

WIDTH = 1
"""Bytes of an activation: 16 texts at a time are products above all; 97 in 100 of the likeliest tokens are the same."""

State = dict[str, Any]


@dataclass(frozen=True)
class Scribe:
    """see(params, tokens[, cache]) -> (logits, [features,] cache); ends: tokens that end an answer."""

    see: Callable[..., Any]
    params: Any
    ends: tuple[int, ...] = ()

    def reads(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """A chunk of a lesson: what follows every token of texts i32[n,t]."""
        noted = _read(self.see, self.params, jnp.asarray(tokens))
        spans = np.tile(np.asarray([[1, tokens.shape[1]]], np.int32), (len(tokens), 1))
        return dict(zip(FIELDS, (tokens, spans, *map(np.asarray, noted)), strict=False))

    def answers(
        self, prompts: Sequence[Sequence[int]], whole: int, seed: int, warm: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """A chunk of a lesson: prompts, and what the target says after each, `whole` tokens a row in all.

        warm f32[n]: temperatures.
        """
        rows, lengths = len(prompts), np.asarray([len(prompt) for prompt in prompts], np.int32)
        wide = -(-int(lengths.max()) // ROUND) * ROUND
        tokens, new = np.zeros((rows, whole), np.int32), whole - wide
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        heat = np.where(np.arange(rows) % 3 == 2, WARM, 0.0) if warm is None else warm
        shapes = jax.eval_shape(self.see, self.params, jnp.zeros((rows, 1), jnp.int32))
        cache, ends = empty_cache(shapes[-1], whole), jnp.asarray(self.ends or (-1,), jnp.int32)
        begun, cache, last = _begun(self.see, self.params, jnp.asarray(tokens[:, :wide]), cache, jnp.asarray(lengths))
        key, heat = jax.random.key(seed), jnp.asarray(heat, jnp.float32)
        steps, counts = _written(self.see, self.params, cache, last, heat, ends, key, new)
        return _aligned(tokens, begun, steps, lengths, lengths + np.asarray(counts))


def _aligned(
    tokens: np.ndarray, begun: Sequence[jax.Array], steps: Sequence[jax.Array], lengths: np.ndarray, ends: np.ndarray
) -> dict[str, np.ndarray]:
    """What was noted of prompts [n,wide,...] and of each step [steps,n,...], as rows [n,t,...]."""
    rows, whole = tokens.shape
    out = {"tokens": tokens, "spans": np.stack([lengths, ends], axis=1)}
    out |= {name: np.zeros((rows, whole, *x.shape[2:]), x.dtype) for name, x in zip(FIELDS[2:], begun, strict=False)}
    prompts = [tokens, *map(np.asarray, begun)]
    said = [np.asarray(x) for x in steps]
    for name, prompt, step in zip(("tokens", *FIELDS[2:]), prompts, said, strict=False):
        for row, length in enumerate(lengths):
            count = min(len(step), whole - length)
            out[name][row, :length] = prompt[row, :length]
            out[name][row, length : length + count] = step[:count, row]
    return out


def scribe(name: str, module: Module, store: Store, context: Context, features: bool) -> Scribe:
    """Of a target with 4-bit weights, with features where a head is to read them."""
    coded, arrays = int4(module, store)
    assert coded.decode is not None
    if features:
        verify = head.tapped(cut(name, coded))
        decode = replace(coded.decode, attrs={**coded.decode.attrs, "verify": Ref(verify.name)})
        coded = replace(coded, funcs={**coded.funcs, verify.name: verify}, decode=decode)
    model = context.model(coded, arrays)
    see = model.program.entries[head.VERIFY] if features else model.program.extend
    return Scribe(see, packed(model.params), context.tokenizer.eos_ids if context.tokenizer else ())


def likeliest(logits: jax.Array, count: int = TOP) -> tuple[jax.Array, jax.Array]:
    """ids i32, logits f16 [...,count], the greatest first."""
    *outer, vocab = logits.shape
    count, groups = min(count, vocab), -(-vocab // GROUP)
    short = [(0, 0)] * len(outer) + [(0, groups * GROUP - vocab)]
    grouped = jnp.pad(logits.astype(jnp.float32), short, constant_values=-jnp.inf).reshape(*outer, groups, GROUP)
    _, best = lax.top_k(grouped.max(axis=-1), min(count, groups))
    few = jnp.take_along_axis(grouped, best[..., None], axis=-2).reshape(*outer, -1)
    top, at = lax.top_k(few, count)
    ids = jnp.take_along_axis(best, at // GROUP, axis=-1) * GROUP + at % GROUP
    return ids.astype(jnp.int32), top.astype(jnp.float16)


@partial(jax.jit, static_argnums=0)
def _read(see: Callable[..., Any], params: Any, tokens: jax.Array) -> tuple[jax.Array, ...]:
    logits, *others, _ = regions(lambda p, t: see(p, t), width=WIDTH)(params, tokens)
    return *likeliest(logits), *(x.astype(jnp.float16) for x in others)


@partial(jax.jit, static_argnums=0)
def _begun(
    see: Callable[..., Any], params: Any, tokens: jax.Array, cache: Cache, lengths: jax.Array
) -> tuple[tuple[jax.Array, ...], Cache, tuple[jax.Array, jax.Array]]:
    """What is noted of prompts, the cache after them, and the likeliest tokens after each."""
    logits, *others, after = regions(see, width=WIDTH)(params, tokens, cache)
    noted = (*likeliest(logits), *(x.astype(jnp.float16) for x in others))
    ids, top = (jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0] for x in noted[:2])
    return noted, rolled_back(after, lengths), (ids, top.astype(jnp.float32))


@partial(jax.jit, static_argnums=(0, 7))
def _written(
    see: Callable[..., Any], params: Any, cache: Cache, last: tuple[jax.Array, jax.Array], warm: jax.Array,
    ends: jax.Array, key: jax.Array, new: int,
) -> tuple[tuple[jax.Array, ...], jax.Array]:  # fmt: skip
    """What is noted of up to `new` tokens more of each row, [new,n,...]; how many count: not what follows an end."""
    ids, top = last
    shapes = jax.eval_shape(see, params, jnp.zeros((len(warm), 1), jnp.int32), cache)
    noted = (ids[:, :1], ids, top.astype(jnp.float16), *(x[:, 0].astype(jnp.float16) for x in _zeros(shapes[1:-1])))
    out = tuple(jnp.zeros((new, x.shape[0], *x.shape[1:]), x.dtype) for x in noted)
    nothing = jnp.zeros(warm.shape, jnp.int32)
    carry = {"i": jnp.int32(0), "out": out, "cache": cache, "last": (ids, top), "done": nothing > 0, "count": nothing}

    def going(carry: State) -> jax.Array:
        return (carry["i"] < new) & ~jnp.all(carry["done"])

    def turn(carry: State) -> State:
        i = carry["i"]
        ids, top = carry["last"]
        token = _drawn(ids, top, warm, jax.random.fold_in(key, i))
        logits, *others, after = see(params, token[:, None], carry["cache"])
        ids, top = likeliest(logits[:, 0])
        noted = (token[:, None], ids, top, *(x[:, 0].astype(jnp.float16) for x in others))
        # By step, not by row: rows stand at places of their own, and writing there would copy all of it.
        out = tuple(lax.dynamic_update_index_in_dim(x, new, i, 0) for x, new in zip(carry["out"], noted, strict=True))
        done = carry["done"] | jnp.any(token[:, None] == ends[None, :], axis=1)
        # The token that ends a text is learned of, what would follow it is not.
        count = carry["count"] + ~done
        last = (ids, top.astype(jnp.float32))
        return {"i": i + 1, "out": out, "cache": after, "last": last, "done": done, "count": count}

    after = regions(lambda carry: lax.while_loop(going, turn, carry), width=WIDTH)(carry)
    (tokens, *noted), count = after["out"], after["count"]
    return (tokens[..., 0], *noted), count


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _drawn(ids: jax.Array, top: jax.Array, warm: jax.Array, key: jax.Array) -> jax.Array:
    """i32[n]: the likeliest, or one drawn among those kept where a row is warm."""
    draw = jax.random.categorical(key, top.astype(jnp.float32) / jnp.maximum(warm, 1e-3)[:, None])
    return jnp.where(warm > 0, jnp.take_along_axis(ids, draw[:, None], axis=1)[:, 0], ids[:, 0])


__all__ = ["Scribe", "likeliest", "scribe"]
