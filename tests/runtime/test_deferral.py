"""Deferral rules: valid distributions, their ends, what they defer, and that drawing by them is exact."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from effc.runtime import deferral
from effc.runtime.deferral import RULES, Own, mixed, stands, variation
from effc.runtime.speculate import residual

TOKENWISE = ("tokenv1", "tokenv2", "tokenv3")
POSITION = ("chow", "diff", "opt")
ENDS = {
    "chow": (0.0, 1.0), "diff": (-1.0, 1.0), "opt": (-np.inf, np.inf), "tokenv1": (-1.0, 1.0), "tokenv2": (-1.0, 1.0),
    "tokenv3": (-1e-3, 1.0),
}  # fmt: skip
"""Alphas that give p, and q."""


def shares(row: Sequence[float]) -> np.ndarray:
    return np.asarray(row, np.float32) / np.float32(sum(row))


weights = st.lists(st.integers(0, 20), min_size=5, max_size=5).filter(any).map(shares)
rules = st.sampled_from(sorted(RULES))
alphas = st.one_of(st.floats(-1, 1), st.sampled_from([-np.inf, 0.0, 1.0, np.inf]))


def both(rule: str, alpha: float, p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, float]:
    """At temperature 1, where own probabilities are those sampled."""
    own = Own(jnp.asarray(p), jnp.asarray(q), variation(jnp.asarray(p), jnp.asarray(q)))
    pi, deferred = mixed(rule, jnp.asarray([alpha], jnp.float32), jnp.asarray(p), jnp.asarray(q), own)
    return np.asarray(pi), float(deferred)


@settings(max_examples=150, deadline=None)
@given(rules, alphas, weights, weights)
def test_every_rule_gives_a_distribution_that_is_drawn_exactly(
    rule: str, alpha: float, p: np.ndarray, q: np.ndarray
) -> None:
    """Accepting q's tokens with min(1, pi/q) and drawing the rest from the residual has marginal pi."""
    pi, deferred = both(rule, alpha, p, q)
    assert (pi >= 0).all() and pi.sum() == pytest.approx(1, abs=1e-5) and -1e-6 <= deferred <= 1 + 1e-6
    beta = np.minimum(pi, q).sum()
    marginal = np.minimum(pi, q) + (1 - beta) * np.asarray(residual(jnp.asarray(pi), jnp.asarray(q)))
    np.testing.assert_allclose(marginal, pi, atol=2e-6)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(ENDS)), weights, weights)
def test_ends_are_the_two_models(rule: str, p: np.ndarray, q: np.ndarray) -> None:
    low, high = ENDS[rule]
    if rule != "chow" or q.max() < 1:  # Chow at 0 keeps what the small model is certain of
        np.testing.assert_array_equal(both(rule, low, p, q)[0], p)
    np.testing.assert_array_equal(both(rule, -np.inf, p, q)[0], p)
    if rule != "opt" or np.abs(p - q).sum() > 0:
        np.testing.assert_allclose(both(rule, high, p, q)[0], q, atol=1e-6)


def test_tokenv3_at_zero_is_not_lossless() -> None:
    """It still keeps the large model's likeliest token m: pi(m) = q(m) + p(m) (1 - q(m))."""
    p, q = shares([5, 4, 1]), shares([9, 1, 0])
    pi, _ = both("tokenv3", 0.0, p, q)
    assert pi[0] == pytest.approx(q[0] + p[0] * (1 - q[0]), abs=1e-6) and pi[0] - p[0] > 0.4
    np.testing.assert_array_equal(both("tokenv3", -1e-3, p, q)[0], p)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(POSITION), st.floats(-1, 1), weights, weights)
def test_what_a_position_rule_rejects_is_r_times_the_variation(
    rule: str, alpha: float, p: np.ndarray, q: np.ndarray
) -> None:
    pi, deferred = both(rule, alpha, p, q)
    rejected = 1 - np.minimum(pi, q).sum()
    assert deferred in (0.0, 1.0)
    assert rejected == pytest.approx(deferred * float(variation(jnp.asarray(p), jnp.asarray(q))[0]), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(rules, st.lists(alphas, min_size=2, max_size=6), weights, weights)
def test_less_is_deferred_as_alpha_grows(rule: str, at: list[float], p: np.ndarray, q: np.ndarray) -> None:
    deferred = [both(rule, alpha, p, q)[1] for alpha in sorted(at)]
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(deferred))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TOKENWISE), weights, weights, st.floats(-1, 1), st.floats(-1, 1))
def test_what_a_token_rule_keeps_is_nested_and_accepted(
    rule: str, p: np.ndarray, q: np.ndarray, one: float, two: float
) -> None:
    own = Own(jnp.asarray(p), jnp.asarray(q), variation(jnp.asarray(p), jnp.asarray(q)))
    small, large = (np.asarray(RULES[rule](own, jnp.asarray([alpha]))) for alpha in sorted((one, two)))
    assert (small <= large).all()
    pi, _ = both(rule, max(one, two), p, q)
    assert (pi[large] >= q[large] - 1e-7).all()  # so drafts that are kept stand with certainty


@settings(max_examples=100, deadline=None)
@given(rules, alphas, weights, weights)
def test_greedy_is_the_rule_on_distributions_of_one_token(
    rule: str, alpha: float, p: np.ndarray, q: np.ndarray
) -> None:
    """What is sampled is all on the likeliest tokens, what decides are the models' own probabilities."""
    ones_p, ones_q = np.eye(5, dtype=np.float32)[[p.argmax(), q.argmax()]]
    tv = variation(jnp.asarray(ones_p), jnp.asarray(ones_q))
    draft, at = jnp.asarray(q.argmax()), jnp.asarray([alpha], jnp.float32)
    kept = bool(stands(rule, at, Own(jnp.asarray(p), jnp.asarray(q.max(keepdims=True)), tv), draft))
    if rule != "lossy":  # lenience takes its own greedy form, that of TokenV3
        pi, _ = mixed(rule, at, jnp.asarray(ones_p), jnp.asarray(ones_q), Own(jnp.asarray(p), jnp.asarray(q), tv))
        assert int(pi.argmax()) == (q.argmax() if kept else p.argmax()) and float(pi.max()) == 1
    if rule in ("tokenv3", "lossy"):
        assert kept == bool(p[q.argmax()] >= (1 - np.float32(alpha)) * p.max())


def test_lenience_is_accepting_more_and_drawing_what_is_left() -> None:
    p, q, alpha = shares([1, 3, 6]), shares([5, 4, 1]), 0.4
    pi, _ = both("lossy", alpha, p, q)
    accepted = np.minimum(1, p / ((1 - alpha) * q)) * q
    left = np.maximum(p - q, 0)
    np.testing.assert_allclose(pi, accepted + (1 - accepted.sum()) * left / left.sum(), atol=1e-6)
    np.testing.assert_array_equal(both("lossy", 0.0, p, q)[0], p)
    assert (pi <= p / (1 - alpha) + 1e-6).all()


def test_opt_asks_less_where_models_disagree_more() -> None:
    """The trap: rejecting is dear there, so a small model that is surely wrong passes."""
    p, near, far = shares([6, 2, 2]), shares([2, 3, 5]), shares([0, 5, 5])
    assert both("opt", 0.22, p, near)[1] == 1 and both("opt", 0.22, p, far)[1] == 0


def test_grids_go_from_the_safest_on_within_what_means_something() -> None:
    for rule, grid in deferral.GRIDS.items():
        low, high = deferral.RANGES[rule]
        assert list(grid) == sorted(set(grid)) and low <= grid[0] and grid[-1] <= high
    assert sorted(deferral.GRIDS) == sorted(deferral.RANGES) == sorted(RULES)


def test_temperature_does_not_move_what_is_kept() -> None:
    """TokenV3 at temperature 0.2: what it keeps is told by p at temperature 1."""
    logits_p, logits_q = jnp.asarray([1.0, 0.9, -1.0]), jnp.asarray([0.0, 2.0, -1.0])
    cold_p, cold_q = jax.nn.softmax(logits_p / 0.2), jax.nn.softmax(logits_q / 0.2)
    own = Own(jax.nn.softmax(logits_p), jax.nn.softmax(logits_q), variation(cold_p, cold_q))
    pi, _ = mixed("tokenv3", jnp.asarray([0.15]), cold_p, cold_q, own)
    assert pi[1] == pytest.approx(float(cold_q[1] + cold_p[1] * (1 - cold_q[0] - cold_q[1])), abs=1e-6)
    assert float(cold_p[1]) < 0.85 * float(cold_p[0])  # by the scaled p it would not be
