"""Deferral rules of speculative cascades: which drafts a small model keeps, and the distribution that makes.

q is the small model's distribution and p the large one's, both as sampled (temperature, filters). What decides is
`own`: both models' own probabilities at temperature 1, unfiltered, so a rule means the same at every temperature.
Only OPT's total variation is of p and q as sampled. Shapes end in V, the tokens; alpha ends in 1.

TokenV3 at alpha 0 is NOT lossless: it still keeps the large model's likeliest token. Every rule is at LOSSLESS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from effc.runtime.speculate import residual

LOSSLESS = -jnp.inf
"""The alpha at which every rule defers always: what is drawn is the large model's own."""


@dataclass(frozen=True)
class Own:
    """p, q: own probabilities of both models. q may be [...,1], its largest alone, where `wanted` asks for no more."""

    p: jax.Array
    q: jax.Array | None
    tv: jax.Array  # [...,1], of what is sampled


Keeps = Callable[[Own, jax.Array], jax.Array]
"""(own, alpha) -> bool[...,1], or bool[...,V] where it depends on the token."""


def _top(x: jax.Array | None) -> jax.Array:
    assert x is not None
    return x.max(axis=-1, keepdims=True)


def _each(x: jax.Array | None) -> jax.Array:
    assert x is not None
    return x


def _times(alpha: jax.Array, tv: jax.Array) -> jax.Array:
    """Nothing where p and q are the same, at an infinite alpha too."""
    return jnp.where(tv > 0, alpha * tv, 0)


RULES: Mapping[str, Keeps] = {
    "chow": lambda own, alpha: _top(own.q) >= 1 - alpha,
    "diff": lambda own, alpha: _top(own.q) >= _top(own.p) - alpha,
    "opt": lambda own, alpha: (alpha > LOSSLESS) & (_top(own.q) >= _top(own.p) - _times(alpha, own.tv)),
    "tokenv1": lambda own, alpha: _each(own.q) >= _top(own.p) - alpha,
    "tokenv2": lambda own, alpha: own.p >= _top(own.p) - alpha,
    "tokenv3": lambda own, alpha: own.p >= (1 - alpha) * _top(own.p),
    "lossy": lambda own, alpha: own.p >= (1 - alpha) * _top(own.p),
}
"""When the small model's token is kept. `lossy` is no rule but speculation with lenience 1 - alpha, a baseline: this
is its test where the likeliest token is taken."""

RANGES: Mapping[str, tuple[float, float]] = {
    "chow": (0.0, 1.0), "diff": (-1.0, 1.0), "opt": (-float("inf"), float("inf")), "tokenv1": (-1.0, 1.0),
    "tokenv2": (-1.0, 1.0), "tokenv3": (-1.0, 1.0), "lossy": (0.0, 1.0),
}  # fmt: skip
"""Alphas that say different things, from the large model's distribution to the small one's."""

GRIDS: Mapping[str, tuple[float, ...]] = {
    "chow": (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "diff": (-0.8, -0.6, -0.5, -0.4, -0.3, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0),
    "opt": (-0.8, -0.6, -0.5, -0.4, -0.3, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0),
    "tokenv1": (-0.8, -0.6, -0.5, -0.4, -0.3, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0),
    "tokenv2": (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    "tokenv3": (0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "lossy": (0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
}  # fmt: skip
"""Alphas from the safest on, in the order in which they are tested: fixed before any text is seen."""


def wanted(rule: str, greedy: bool, vocab: int) -> int:
    """How much of the small model's own probabilities a rule reads: none, 1 for the largest, or all of them."""
    if rule in ("chow", "diff", "opt"):
        return 1
    # A greedy draft is the small model's likeliest token: its probability is the largest.
    return (1 if greedy else vocab) if rule == "tokenv1" else 0


def variation(p: jax.Array, q: jax.Array) -> jax.Array:
    """[...,1]: total variation, sum of max(0, q - p)."""
    return jnp.maximum(q - p, 0).sum(axis=-1, keepdims=True)


def mixed(rule: str, alpha: jax.Array, p: jax.Array, q: jax.Array, own: Own) -> tuple[jax.Array, jax.Array]:
    """The distribution to draw from, [...,V], and how much of q it defers, [...]; p itself where all of it is."""
    if rule == "lossy":
        return _lossy(alpha, p, q)
    kept = RULES[rule](own, alpha)
    if kept.shape[-1] == 1:
        return jnp.where(kept, q, p), 1.0 - kept[..., 0].astype(jnp.float32)
    mine = jnp.where(kept, q, 0)
    # Not the sum of what is deferred: where nothing is kept this is 1 to the last bit.
    deferred = jnp.maximum(1 - mine.sum(axis=-1, keepdims=True), 0)
    return mine + p * deferred, deferred[..., 0]


def _lossy(alpha: jax.Array, p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What comes of accepting q's tokens with min(1, p / ((1 - alpha) q)), else drawing norm(max(0, p - q))."""
    lenience = 1 - jnp.clip(alpha, 0, 1)  # at infinity 0 * inf would be no number
    kept = jnp.where(p >= lenience * q, q, p / jnp.where(lenience > 0, lenience, 1))
    rest = jnp.maximum(1 - kept.sum(axis=-1, keepdims=True), 0)
    return jnp.where(alpha <= 0, p, kept + rest * residual(p, q)), rest[..., 0]


def stands(rule: str, alpha: jax.Array, own: Own, drafts: jax.Array) -> jax.Array:
    """bool[...]: which of the likeliest tokens of q, drafts[...], are taken though p's may be others.

    As `mixed` of distributions that are all on one token, but TokenV3 is the same with and without a temperature.
    """
    kept = RULES[rule](own, alpha)
    return (kept if kept.shape[-1] == 1 else jnp.take_along_axis(kept, drafts[..., None], axis=-1))[..., 0]


__all__ = ["GRIDS", "LOSSLESS", "RANGES", "RULES", "Own", "mixed", "stands", "variation", "wanted"]
