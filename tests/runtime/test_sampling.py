"""Identities that hold for every sampler setting."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.errors import EffcError
from effc.runtime import sampling
from effc.runtime.sampling import Sampling, choose, row_keys

# One shape, so that each filter compiles once; XLA takes subnormal numbers for 0.
LOGITS = st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=8, max_size=8)
TOP_K, TOP_P, MIN_P = jax.jit(sampling.top_k), jax.jit(sampling.top_p), jax.jit(sampling.min_p)
QUICK = settings(deadline=None, max_examples=60)


def kept(logits: jax.Array) -> np.ndarray:
    return np.isfinite(np.asarray(logits))


@given(LOGITS, st.integers(1, 9))
@QUICK
def test_top_k_keeps_the_k_largest_and_ties(values: list[float], k: int) -> None:
    logits = np.array([values], np.float32)
    floor = np.sort(logits[0])[::-1][min(k, len(values)) - 1]
    assert (kept(TOP_K(jnp.asarray(logits), k))[0] == (logits[0] >= floor)).all()


@given(LOGITS, st.floats(0.01, 1.0))
@QUICK
def test_top_p_keeps_enough_and_no_more_than_it_must(values: list[float], p: float) -> None:
    logits = np.array([values], np.float32)
    keep = kept(TOP_P(jnp.asarray(logits), p))[0]
    weights = np.asarray(jax.nn.softmax(jnp.asarray(logits)))[0].astype(float)
    assert keep[logits[0].argmax()]
    assert weights[keep].sum() >= min(p, 1) - 1e-5
    least = weights[keep].min()
    assert weights[weights > least].sum() < p + 1e-5  # without its least likely tokens it were too little
    assert (logits[0][keep].min() > logits[0][~keep]).all()


@given(LOGITS, st.floats(0.0, 1.0))
@QUICK
def test_min_p_compares_with_the_most_likely(values: list[float], p: float) -> None:
    logits = np.array([values], np.float32)
    keep = kept(MIN_P(jnp.asarray(logits), p))[0]
    ratio = np.exp(logits[0].astype(float) - logits[0].max())
    assert keep[logits[0].argmax()]
    assert keep[ratio > p * 1.0001].all() and not keep[ratio < p * 0.9999].any()


def test_neutral_settings_change_nothing() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 50)), jnp.float32)
    for changed in (TOP_P(logits, 1.0), MIN_P(logits, 0.0), TOP_K(logits, 50)):
        assert (changed == logits).all()
    assert (sampling.penalize(logits, jnp.ones((3, 50), bool), 1.0) == logits).all()


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = jnp.array([[2.0, -2.0, 3.0]])
    seen = jnp.array([[True, True, False]])
    assert sampling.penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0]]


def draws(setting: Sampling, logits: np.ndarray, count: int) -> np.ndarray:
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    keys = row_keys(jax.random.key(0), jnp.arange(count), jnp.zeros(count, jnp.int32))
    return np.asarray(choose(many, None, keys, setting.numbers(), greedy=setting.greedy, filters=setting.filters))


def test_draws_follow_the_distribution() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    found = np.bincount(draws(Sampling(temperature=1.0), logits, 20000), minlength=4) / 20000
    np.testing.assert_allclose(found, [0.5, 0.3, 0.15, 0.05], atol=0.015)  # four standard deviations
    cold = np.bincount(draws(Sampling(temperature=0.5), logits, 20000), minlength=4) / 20000
    want = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(cold, want / want.sum(), atol=0.015)


def test_filters_run_in_order_each_on_what_is_left() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    only = Sampling(temperature=1.0, top_k=2, top_p=0.5)  # of two tokens at 4/7 and 3/7 the first is enough
    assert set(draws(only, logits, 200)) == {0}
    assert set(draws(Sampling(temperature=1.0, top_p=0.5), logits, 200)) == {0, 1}


def test_a_tiny_temperature_and_zero_are_greedy() -> None:
    logits = np.array([0.1, 0.2, 0.3])
    assert set(draws(Sampling(), logits, 10)) == {2} == set(draws(Sampling(temperature=1e-4), logits, 50))


def test_keys_depend_on_row_and_position_only() -> None:
    seed = jax.random.key(7)
    both = row_keys(seed, jnp.array([0, 5]), jnp.array([3, 9]))
    alone = row_keys(seed, jnp.array([5]), jnp.array([9]))
    assert (jax.random.key_data(both[1]) == jax.random.key_data(alone[0])).all()
    assert (jax.random.key_data(both[0]) != jax.random.key_data(both[1])).any()


def test_changing_numbers_compiles_nothing() -> None:
    one, two = Sampling(temperature=0.7, top_k=5), Sampling(temperature=1.3, top_k=40)
    assert one.filters == two.filters == {"top_k"}
    assert jax.tree.structure(one.numbers()) == jax.tree.structure(two.numbers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, want 0 (greedy) or more"),
        ({"top_p": 0.0}, "top_p is 0.0, want more than 0, at most 1"),
        ({"min_p": 1.5}, "min_p is 1.5, want 0 to 1"),
        ({"top_k": -1}, "top_k is -1, want 0 (off) or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, want more than 0"),
        ({"temperature": float("nan")}, "temperature is nan, want 0 (greedy) or more"),
    ],
)
def test_senseless_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EffcError) as error:
        Sampling(**options)
    assert message in str(error.value)
