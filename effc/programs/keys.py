"""Randomness by name: what a site draws depends on the seed, the trace's number and the site's name alone."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

Key = tuple[int, int]
"""The two words of a threefry key, as plain numbers: hashable, and the same whatever the default generator is."""

_IMPL = "threefry2x32"


def root(seed: int | jax.Array) -> Key:
    """Of a number, or of a JAX key."""
    if not isinstance(seed, jax.Array):
        return _plain(jax.random.key_data(jax.random.key(seed, impl=_IMPL)))
    typed = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    words = np.asarray(jax.random.key_data(seed) if typed else seed, np.uint32)
    return _plain(words.reshape(-1)[:2])


def fold(key: Key, *words: int) -> Key:
    """`jax.random.fold_in` of each word in turn."""
    return _plain(_fold(np.asarray(key, np.uint32), np.asarray(words, np.uint32)))


def at(key: Key, name: str) -> Key:
    """The key of a site: 64 bits of its name folded in (algorithms 6.3-2)."""
    digest = hashlib.sha256(name.encode()).digest()
    return fold(key, int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))


def rng(key: Key) -> np.random.Generator:
    """Draws on the host: cheaper than a device call for a coin."""
    return np.random.Generator(np.random.Philox(key=key[0] << 32 | key[1]))


def stacked(keys: list[Key]) -> jax.Array:
    """Typed keys [b] for the device."""
    return jax.random.wrap_key_data(jnp.asarray(np.asarray(keys, np.uint32)), impl=_IMPL)


@jax.jit
def _fold(data: jax.Array, words: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(data, impl=_IMPL)
    for word in words:
        key = jax.random.fold_in(key, word)
    return jax.random.key_data(key)


def _plain(data: jax.Array | np.ndarray) -> Key:
    high, low = (int(word) for word in np.asarray(data))
    return high, low
