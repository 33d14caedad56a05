"""From logits to a token. Order: repetition penalty, temperature, top-k, top-p, min-p, then one draw.

Every filter keeps the most likely token, and keeps or drops tokens of equal probability together.
Thresholds are found by bisection over the bits of the logits, which is exact and needs no sort;
settings are numbers, not constants of the program, so changing one compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax import lax

from effc.errors import EffcError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 change nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "more than 0")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def filters(self) -> frozenset[str]:
        """Names of the settings that do something: these decide what is compiled."""
        neutral = Sampling(temperature=self.temperature)
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) != getattr(neutral, f.name))

    def numbers(self) -> dict[str, jax.Array]:
        """The settings as arrays."""
        return {f.name: jnp.float32(getattr(self, f.name)) for f in fields(self)}


def _check(name: str, value: float, ok: bool, want: str) -> None:
    if not ok:
        raise EffcError(f"sampling: {name} is {value}, want {want}")


Numbers = dict[str, jax.Array]


def choose(
    logits: jax.Array, seen: jax.Array | None, keys: jax.Array, numbers: Numbers, *, greedy: bool,
    filters: frozenset[str],
) -> jax.Array:  # fmt: skip
    """i32[b]: a token for each row of logits[b,V]; seen bool[b,V] marks tokens so far, keys[b] randomness."""
    logits = logits.astype(jnp.float32)
    if "repetition_penalty" in filters and seen is not None:
        logits = penalize(logits, seen, numbers["repetition_penalty"])
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filtered(logits / numbers["temperature"], numbers, filters)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filtered(logits: jax.Array, numbers: Numbers, filters: frozenset[str]) -> jax.Array:
    """Logits [b,V] with what top-k, top-p and min-p drop at -inf; each sees what the one before left."""
    if "top_k" in filters:
        logits = top_k(logits, numbers["top_k"])
    if "top_p" in filters:
        logits = top_p(logits, numbers["top_p"])
    return min_p(logits, numbers["min_p"]) if "min_p" in filters else logits


def row_keys(seed: jax.Array, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """A key for each row [b] and position [b], whatever the other rows are; seed is one key, or one a row [b]."""
    seeds = jnp.broadcast_to(seed, rows.shape)
    return jax.vmap(lambda key, row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(seeds, rows, positions)


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Logits of seen tokens divided by the penalty where positive, multiplied where negative."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: jax.Array, k: jax.Array | float) -> jax.Array:
    """The k largest, ties of the last of them included."""
    return _keep(logits, lambda kept: kept.sum(axis=-1, keepdims=True).astype(jnp.float32) >= k)


def top_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """The fewest most likely tokens whose probabilities sum to p or more."""
    weights = jax.nn.softmax(logits, axis=-1)
    # Sums in f32 may fall short of 1 by a few parts in a million; wanting less than the sum keeps p=1 whole.
    want = jnp.minimum(p, weights.sum(axis=-1, keepdims=True) * (1 - 1e-6))
    return _keep(logits, lambda kept: jnp.where(kept, weights, 0).sum(axis=-1, keepdims=True) >= want)


def min_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """Tokens at least p times as likely as the most likely one."""
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def _keep(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Logits at or above the greatest threshold that leaves enough; enough(bool[b,V]) -> bool[b,1].

    Floats in the order of their bits are integers, so 32 halvings find the threshold exactly.
    """
    order = _ordered(logits)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # low leaves enough, high does not
        middle = low + ((high - low) >> 1)
        ok = enough(order >= middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    threshold, _ = lax.fori_loop(0, 32, halve, (low, order.max(axis=-1, keepdims=True) + 1))
    best = order == order.max(axis=-1, keepdims=True)
    return jnp.where((order >= threshold) | best, logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """u32 in the order of the floats; both zeros are one."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))
