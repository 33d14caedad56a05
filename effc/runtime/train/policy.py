"""On-policy batches: now and then the student writes the rest of a text itself, and the teacher marks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effc.errors import EffcError
from effc.runtime.cache import Cache, cache_shapes, empty_cache
from effc.runtime.train.plan import Batch, Batches, Tree

Extend = Callable[..., tuple[jax.Array, Cache]]


def on_policy(batches: Batches, extend: Extend, pick: Callable[[Tree], Tree], fraction: float, seed: int) -> Batches:
    """`batches`, a `fraction` of them with all but a short beginning written by the student, at temperature 1.

    pick takes the student's parameters out of those that are trained. In such a batch only what was written counts
    (mask), and none of it is text to be told (gold). Which steps these are depends on the seed alone.
    """
    if not 0 <= fraction <= 1:
        raise EffcError(f"on-policy {fraction:g}: want a fraction, 0 to 1")
    write = jax.jit(_writer(extend), static_argnums=3)

    def batch(step: int, params: Tree) -> Batch:
        given = batches(step, params)
        tokens, mask = np.asarray(given["tokens"]), np.asarray(given["mask"])
        if np.random.default_rng((seed, step, 1)).random() >= fraction:
            return {**given, "gold": mask}
        begun = max(1, tokens.shape[1] // 8)
        key = jax.random.fold_in(jax.random.key(seed), step)
        written = np.asarray(write(pick(params), jnp.asarray(tokens[:, :begun]), key, tokens.shape[1] - begun))
        own = np.broadcast_to(np.arange(mask.shape[1]) >= begun - 1, mask.shape)
        whole = np.concatenate([tokens[:, :begun], written], axis=1)
        return {**given, "tokens": whole, "mask": own, "gold": np.zeros_like(mask)}

    return batch


def _writer(extend: Extend) -> Callable[[Tree, jax.Array, jax.Array, int], jax.Array]:
    """(params, begun i32[b,n], key, count) -> i32[b,count] drawn from the model."""

    def call(params: Tree, begun: jax.Array, key: jax.Array, count: int) -> jax.Array:
        rows, length = begun.shape
        cache = empty_cache(cache_shapes(extend, params, rows), length + count)
        logits, cache = extend(params, begun, cache)

        def turn(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            last, cache = carry
            token = jax.random.categorical(key, last.astype(jnp.float32)).astype(jnp.int32)
            logits, cache = extend(params, token[:, None], cache)
            return (logits[:, -1], cache), token

        _, drawn = lax.scan(turn, (logits[:, -1], cache), jax.random.split(key, count))
        return drawn.T

    return call
