"""What caches hold: rows as computed, or narrower."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.runtime import coded, layers
from effc.runtime.cache import EXACT, Cache, Step, cache_shapes, empty_cache, kept_as

STEPS = {"f16": 0, "i8": 127.5, "i4": 7.5}


def rows(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@given(st.sampled_from(sorted(STEPS)), st.integers(0, 2**32 - 1), st.sampled_from([2, 6, 16, 64]))
@settings(deadline=None, max_examples=20)
def test_half_a_step_is_lost(kind: str, seed: int, width: int) -> None:
    x = rows(seed, 3, width) * jnp.asarray([[1e-3], [1.0], [1e3]])
    stored = coded.encode(x, kind)
    assert coded.kind_of(stored) == kind
    lost = np.abs(np.asarray(coded.seen(x, kind) - x))
    most = np.abs(np.asarray(x)).max(axis=-1, keepdims=True)
    assert np.all(lost <= (most / STEPS[kind] * 0.5001 if STEPS[kind] else 2**-11 * np.abs(x)) + 1e-7)
    np.testing.assert_array_equal(coded.seen(jnp.zeros_like(x), kind), 0)


def test_what_is_too_large_for_half_precision_stays_finite() -> None:
    x = jnp.asarray([1e6, -1e6, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(coded.seen(x, "f16"), np.asarray([65504, -65504, np.nan], np.float32))


def attend(p: Any, tokens: jax.Array, cache: Cache | None = None, kind: str = "float") -> tuple[jax.Array, Cache]:
    step = Step(tokens, cache)
    x = jnp.sin(tokens[..., None, None] * jnp.arange(1.0, 33).reshape(1, 1, 2, 16))
    k, v = step.append(x, x * p, cache=kind)
    step.append(x, cache=EXACT)
    return layers.attention(x, k, v, step.positions), step.cache()


@pytest.mark.parametrize("kind", sorted(STEPS))
def test_engines_narrow_what_programs_leave_open(kind: str) -> None:
    p, tokens = jnp.float32(2.0), jnp.asarray([[3, 1, 4, 1], [5, 9, 2, 6]])
    shapes = cache_shapes(attend, p, 2)
    first, other = kept_as(shapes, kind).entries
    assert {coded.kind_of(x) for x in first.values} == {kind} and other == shapes.entries[1]
    assert kept_as(kept_as(shapes, kind), "f16").entries[0] == first, "what is decided stays"
    want, _ = attend(p, tokens, kind=kind)
    cache = empty_cache(kept_as(shapes, kind), 8)
    whole, after = attend(p, tokens, cache)
    np.testing.assert_allclose(whole, want, atol=1e-5)
    for i in range(4):
        one, cache = attend(p, tokens[:, i : i + 1], cache)
        np.testing.assert_allclose(one, want[:, i : i + 1], atol=1e-5)
    assert [x.dtype for x in jax.tree.leaves(cache)] == [x.dtype for x in jax.tree.leaves(after)]
