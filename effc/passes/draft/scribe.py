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

State = dict[str, jax.Array]


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

    def answers(self, prompts: Sequence[Sequence[int]], whole: int, seed: int) -> dict[str, np.ndarray]:
        """A chunk of a lesson: prompts, and what the target says after each, `whole` tokens a row in all."""
        rows, lengths = len(prompts), np.asarray([len(prompt) for prompt in prompts], np.int32)
        wide = -(-int(lengths.max()) // ROUND) * ROUND
        tokens, new = np.zeros((rows, whole), np.int32), whole - wide
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        warm = jnp.asarray(np.where(np.arange(rows) % 3 == 2, WARM, 0.0), jnp.float32)
        shapes = jax.eval_shape(self.see, self.params, jnp.zeros((rows, 1), jnp.int32))
        cache = empty_cache(shapes[-1], whole)
        ends = jnp.asarray(self.ends or (-1,), jnp.int32)
        state, last = _begun(self.see, self.params, jnp.asarray(tokens), cache, jnp.asarray(lengths), wide)
        state = _written(self.see, self.params, state, last, warm, ends, jax.random.key(seed), new)
        found = {name: np.asarray(state[name]) for name in FIELDS if name in state}
        return found | {"spans": np.stack([lengths, np.asarray(state["count"])], axis=1)}


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
    logits, *others, _ = regions(lambda p, t: see(p, t))(params, tokens)
    return *likeliest(logits), *(x.astype(jnp.float16) for x in others)


@partial(jax.jit, static_argnums=(0, 5))
def _begun(
    see: Callable[..., Any], params: Any, tokens: jax.Array, cache: Cache, lengths: jax.Array, wide: int
) -> tuple[dict[str, Any], jax.Array]:
    """What is noted of prompts, with room for answers, and the logits f32[n,V] after each."""
    logits, *others, after = regions(see)(params, tokens[:, :wide], cache)
    noted = (*likeliest(logits), *(x.astype(jnp.float16) for x in others))
    room = tokens.shape[1] - wide
    kept = [jnp.pad(x, ((0, 0), (0, room), (0, 0))) for x in noted]
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    state = {"tokens": tokens, "count": lengths, "done": jnp.zeros(lengths.shape, bool)}
    names = [name for name in FIELDS if name not in ("tokens", "spans")]
    return {**state, **dict(zip(names, kept, strict=False)), "cache": rolled_back(after, lengths)}, last


@partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def _written(
    see: Callable[..., Any], params: Any, state: dict[str, Any], last: jax.Array, warm: jax.Array, ends: jax.Array,
    key: jax.Array, new: int,
) -> dict[str, Any]:  # fmt: skip
    """The state after up to `new` tokens more of each row; what a row's end is followed by is not counted."""
    ids, top = likeliest(last)

    def going(carry: tuple[jax.Array, State, jax.Array, jax.Array]) -> jax.Array:
        return (carry[0] < new) & ~jnp.all(carry[1]["done"])

    def turn(carry: tuple[jax.Array, State, jax.Array, jax.Array]) -> tuple[jax.Array, State, jax.Array, jax.Array]:
        i, state, ids, top = carry
        token = _drawn(ids, top, warm, jax.random.fold_in(key, i))
        state = dict(state) | {"tokens": _put(state["tokens"], token[:, None], state["count"])}
        logits, *others, cache = see(params, token[:, None], state["cache"])
        ids, top = likeliest(logits[:, 0])
        noted = dict(zip(("ids", "logits", "features"), (ids, top, *(x[:, 0] for x in others)), strict=False))
        state |= {n: _put(state[n], x[:, None].astype(state[n].dtype), state["count"]) for n, x in noted.items()}
        done = state["done"] | jnp.any(token[:, None] == ends[None, :], axis=1)
        # The token that ends a text is learned of, what would follow it is not.
        return i + 1, {**state, "cache": cache, "done": done, "count": state["count"] + ~done}, ids, top

    def run(carry: Any) -> Any:
        return lax.while_loop(going, turn, carry)

    return regions(run)((jnp.int32(0), state, ids, top))[1]


def _drawn(ids: jax.Array, top: jax.Array, warm: jax.Array, key: jax.Array) -> jax.Array:
    """i32[n]: the likeliest, or one drawn among those kept where a row is warm."""
    draw = jax.random.categorical(key, top.astype(jnp.float32) / jnp.maximum(warm, 1e-3)[:, None])
    return jnp.where(warm > 0, jnp.take_along_axis(ids, draw[:, None], axis=1)[:, 0], ids[:, 0])


def _put(rows: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """rows[n,t,...] with new[n,1,...] at at[n]."""
    rest = (0,) * (rows.ndim - 2)
    return jax.vmap(lambda row, part, i: lax.dynamic_update_slice(row, part, (i, *rest)))(rows, new, at)


__all__ = ["Scribe", "likeliest", "scribe"]
