"""What the vocabulary kernel computes, from logits, in plain JAX."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effc.runtime.qarray import QArray


class Top(NamedTuple):
    """Of each row: the largest logit and its token, the next and its, f32 and i32 [R]; log-sum-exp f32[R].

    Of equal logits the one of the lower token is the larger; `other` of one token alone means nothing.
    """

    best: jax.Array
    token: jax.Array
    second: jax.Array
    other: jax.Array
    total: jax.Array

    def reshape(self, shape: tuple[int, ...]) -> Top:
        """Rows in this shape."""
        return Top(*(part.reshape(shape) for part in self))

    def margin(self) -> jax.Array:
        """Probability of the likeliest token less that of the next, as `exits.margin`."""
        return jnp.exp(self.best - self.total) - jnp.exp(self.second - self.total)

    def likeliest(self) -> jax.Array:
        """Probability of the likeliest token, as `exits.likeliest`."""
        return jnp.exp(self.best - self.total)


def top(x: jax.Array, head: jax.Array | QArray, *, layout: str = "kn", softcap: float = 0.0, width: int = 0) -> Top:
    """Of x[R,K] @ head[K,V] (layout nk: head[V,K]); width: how many of the V are tokens, 0 all."""
    w = head.dequantize() if isinstance(head, QArray) else head.astype(jnp.float32)
    axes = (((1,), (0 if layout == "kn" else 1,)), ((), ()))
    logits = jax.lax.dot_general(x.astype(jnp.float32), w, axes, precision="highest")
    return of_logits(softcap * jnp.tanh(logits / softcap) if softcap else logits, width)


def of_logits(logits: jax.Array, width: int = 0) -> Top:
    """Of logits[R,V]."""
    logits = logits.astype(jnp.float32)[:, : width or logits.shape[1]]
    token = jnp.argmax(logits, axis=1)
    others = jnp.where(jnp.arange(logits.shape[1])[None] == token[:, None], -jnp.inf, logits)
    other, total = jnp.argmax(others, axis=1), jax.nn.logsumexp(logits, axis=1)
    return Top(logits.max(axis=1), token.astype(jnp.int32), others.max(axis=1), other.astype(jnp.int32), total)
