"""How good a student is while it trains: perplexity, KL to its teacher, same likeliest token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.runtime.train.losses import cross_entropy, forward_kl
from effc.runtime.train.plan import Tree

Forward = Callable[[Tree, jax.Array], jax.Array]


def judge(
    teacher: Forward, teacher_params: Tree, student: Forward, tokens: np.ndarray, context: int = 1, rows: int = 2
) -> Callable[[Tree], Mapping[str, float]]:
    """For `fit`: means over tokens i32[n,t], the first `context` of each row only read."""
    told = [jnp.asarray(tokens[i : i + rows]) for i in range(0, len(tokens), rows)]
    scored = tokens.shape[0] * (tokens.shape[1] - context)

    @jax.jit
    def sums(teacher_params: Tree, params: Tree, ids: jax.Array) -> jax.Array:
        t, s = (call(p, ids)[:, context - 1 : -1] for call, p in ((teacher, teacher_params), (student, params)))
        same = jnp.argmax(t, axis=-1) == jnp.argmax(s, axis=-1)
        values: list[Any] = [cross_entropy(s, ids[:, context:]), forward_kl(t, s), same.astype(jnp.float32)]
        return jnp.stack([jnp.sum(value) for value in values])

    def call(params: Tree) -> Mapping[str, float]:
        total = sum(np.asarray(sums(teacher_params, params, ids), np.float64) for ids in told)
        nats, kl, top1 = (float(x) / scored for x in np.asarray(total))
        return {"perplexity": float(np.exp(min(nats, 700.0))), "kl": kl, "top1": top1}

    return call
