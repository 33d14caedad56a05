"""Divergences: non-negative, zero for equals, their limits, gradients, masks, temperature."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.errors import EffcError
from effc.runtime.train.losses import (
    KINDS,
    Kind,
    cross_entropy,
    divergence,
    forward_kl,
    jsd,
    mean,
    reverse_kl,
    tvd,
)

Pair = tuple[jax.Array, jax.Array]
Gradients = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

VOCAB = 7
quick = settings(max_examples=12, deadline=None)


@st.composite
def pairs(draw: st.DrawFn, rows: int = 3) -> Pair:
    """Logits of teacher and student f32[rows,V]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scales = draw(st.tuples(st.floats(0.0, 8.0), st.floats(0.0, 8.0)))
    t, s = (scale * rng.standard_normal((rows, VOCAB)) for scale in scales)
    return jnp.float32(t), jnp.float32(s)


def two(seed: int, rows: int = 5) -> Pair:
    t, s = np.random.default_rng(seed).standard_normal((2, rows, VOCAB))
    return jnp.float32(t), jnp.float32(s)


def probabilities(logits: jax.Array) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@quick
@given(pairs())
def test_they_are_what_the_formulas_say(pair: Pair) -> None:
    t, s = map(probabilities, pair)
    m = 0.3 * t + 0.7 * s

    def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.sum(p * (np.log(p) - np.log(q)), -1)

    want = {"fkl": kl(t, s), "rkl": kl(s, t), "jsd": 0.3 * kl(t, m) + 0.7 * kl(s, m)}
    want["tvd"] = np.abs(t - s).sum(-1) / 2
    for kind, value in want.items():
        got = divergence(kind, beta=0.3)(*pair)  # type: ignore[arg-type]
        np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-5, err_msg=kind)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(pair=pairs())
def test_never_negative_and_zero_for_equals(kind: Kind, pair: Pair) -> None:
    call = divergence(kind)
    assert np.all(np.asarray(call(*pair)) >= -1e-6)
    np.testing.assert_allclose(call(pair[0], pair[0] + 3.0), 0, atol=1e-5)  # the same but for a constant


@quick
@given(pairs())
def test_jsd_is_symmetric_in_the_middle_and_total_variation_below_pinsker(pair: Pair) -> None:
    t, s = pair
    np.testing.assert_allclose(jsd(t, s, 0.5), jsd(s, t, 0.5), atol=1e-5)
    assert np.all(np.asarray(tvd(t, s)) <= np.sqrt(np.asarray(forward_kl(t, s)) / 2 + 1e-6) + 1e-6)


@quick
@given(pairs())
def test_jsd_at_its_ends_is_what_it_tends_to(pair: Pair) -> None:
    t, s = (0.05 * x for x in pair)
    np.testing.assert_array_equal(jsd(t, s, 0.0), forward_kl(t, s))
    np.testing.assert_array_equal(jsd(t, s, 1.0), reverse_kl(t, s))
    # 1 % from the ends, divided by what vanishes there: f32 allows no nearer look
    np.testing.assert_allclose(jsd(t, s, 0.01) / 0.01, forward_kl(t, s), rtol=0.1, atol=1e-3)
    np.testing.assert_allclose(jsd(t, s, 0.99) / 0.01, reverse_kl(t, s), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_cannot_be(kind: Kind) -> None:
    t, s = (x.at[:, 2].set(-jnp.inf) for x in two(0))
    without = jnp.delete(t, 2, -1), jnp.delete(s, 2, -1)
    np.testing.assert_allclose(divergence(kind)(t, s), divergence(kind)(*without), rtol=1e-4, atol=1e-6)
    grads = jax.grad(lambda x: divergence(kind)(t, x).sum())(s)
    assert np.isfinite(grads).all()


def test_what_only_one_side_rules_out() -> None:
    t = jnp.zeros((1, 3))
    s = t.at[0, 0].set(-jnp.inf)
    assert np.isinf(forward_kl(t, s)[0])
    assert np.isfinite([reverse_kl(t, s)[0], jsd(t, s)[0], tvd(t, s)[0]]).all()


@pytest.fixture
def gradients() -> Callable[[Kind, float], Gradients]:
    def of(kind: Kind, temperature: float) -> Gradients:
        call = divergence(kind, temperature=temperature)
        return jax.grad(lambda t, s: call(t, s).sum(), argnums=(0, 1))

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_teacher(kind: Kind, gradients: Callable[[Kind, float], Gradients]) -> None:
    t, s = two(1)
    to_teacher, to_student = gradients(kind, 2.0)(t, s)
    assert not np.any(to_teacher)
    assert np.any(to_student)


def test_the_gradient_of_forward_kl_is_s_minus_t(gradients: Callable[[Kind, float], Gradients]) -> None:
    t, s = two(2)
    np.testing.assert_allclose(gradients("fkl", 1.0)(t, s)[1], probabilities(s) - probabilities(t), atol=1e-6)


def test_temperature_keeps_the_size_of_gradients(gradients: Callable[[Kind, float], Gradients]) -> None:
    t, s = two(3, rows=50)
    sizes = [float(jnp.linalg.norm(gradients("fkl", T)(t, s)[1])) for T in (1.0, 2.0, 4.0, 64.0)]
    assert max(sizes) < 2 * min(sizes)


def test_cross_entropy() -> None:
    logits, targets = two(4)[0], jnp.arange(5)
    want = -np.log(np.take_along_axis(probabilities(logits), np.asarray(targets)[..., None], -1)[..., 0])
    np.testing.assert_allclose(cross_entropy(logits, targets), want, rtol=1e-5)


@quick
@given(st.integers(0, 2**31), st.integers(0, 6))
def test_the_mean_does_not_see_padding(seed: int, padding: int) -> None:
    values = np.random.default_rng(seed).standard_normal(5).astype(np.float32)
    padded = jnp.concatenate([values, jnp.full(padding, 1e6)])
    mask = jnp.arange(5 + padding) < 5
    np.testing.assert_allclose(mean(padded, mask), values.mean(), rtol=1e-5, atol=1e-6)


def test_the_mean_of_nothing_is_zero() -> None:
    assert float(mean(jnp.ones(3), jnp.zeros(3, bool))) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "want one of fkl"),
        ({"temperature": 0.0}, "more than 0"),
        ({"kind": "jsd", "beta": 2}, "0 to 1"),
    ],
)
def test_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(EffcError, match=message):
        divergence(**options)(jnp.zeros(2), jnp.zeros(2))  # type: ignore[arg-type]
