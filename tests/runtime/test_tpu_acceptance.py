"""The TPU acceptance kernel in interpret mode: the tokens that plain JAX draws with the same keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from effc.runtime import speculate
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.acceptance import reference, tpu

DRAWN = (Phase.explicit, Phase.generate)
"""Each case compiles anew: one that fails is shown as it was drawn."""

CASES = st.fixed_dictionaries(
    {
        "rows": st.sampled_from([1, 2, 3, 8, 12, 16]), "vocab": st.sampled_from([5, 130, 1000, 3000, 8192]),
        "columns": st.sampled_from([0, 128, 384]), "zeros": st.sampled_from([0.0, 0.3, 0.95]),
        "same": st.booleans(), "seed": st.integers(0, 2**31),
    }
)  # fmt: skip


def shares(rng: np.random.Generator, rows: int, vocab: int, zeros: float) -> np.ndarray:
    """f32[rows,vocab] of sum 1, some of them zeros: what filters drop."""
    weights = rng.gamma(0.3, size=(rows, vocab)) * (rng.random((rows, vocab)) >= zeros)
    weights[:, rng.integers(vocab)] += 0.1
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def drawn(case: dict[str, Any]) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(case["seed"])
    p, q = (shares(rng, case["rows"], case["vocab"], case["zeros"]) for _ in "pq")
    if case["same"]:  # nothing is left of the first row, p itself of the last
        q[0], q[-1] = p[0], 0
    return jnp.asarray(p), jnp.asarray(q), jax.random.key_data(jax.random.split(jax.random.key(case["seed"]), len(p)))


def check(case: dict[str, Any]) -> None:
    """The very tokens: what is not divided by its sum is larger by the same, and rounding moves a draw in 10^6."""
    p, q, bits = drawn(case)
    have = tpu.draw(p, q, bits, columns=case["columns"], interpret=True)
    assert have.dtype == jnp.int32 and have.tolist() == reference.draw(p, q, bits).tolist()


@settings(max_examples=2, deadline=None, phases=DRAWN)
@given(CASES)
def test_it_draws_what_plain_jax_draws(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, phases=DRAWN)
@given(CASES)
def test_many_draws(case: dict[str, Any]) -> None:
    check(case)


def test_rounds_of_drafts_end_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixty-four rows, drafts accepted and the token after them; in some rows no draft, in some all."""
    rng, rows, vocab = np.random.default_rng(0), 64, 40
    p = jnp.asarray(shares(rng, rows * 3, vocab, 0.3).reshape(rows, 3, vocab))
    q = jnp.asarray(shares(rng, rows * 2, vocab, 0.3).reshape(rows, 2, vocab))
    drafts = jax.random.categorical(jax.random.key(1), jnp.log(q)).astype(jnp.int32)
    count = jnp.asarray(rng.integers(0, 3, rows), jnp.int32)
    keys = jax.random.split(jax.random.key(2), (rows, 3))
    want = speculate.reviewed(p, q, drafts, count, keys)
    with monkeypatch.context() as patch, on_tpu.traced() as calls:
        patch.setattr(on_tpu, "either", lambda tpu, default, *arrays: tpu(*arrays, interpret=True))
        have = speculate.reviewed(p, q, drafts, count, keys)
    assert [call.name for call in calls] == ["acceptance_64x128_c128"]
    assert set(np.asarray(want.accepted)) == {0, 1, 2}
    np.testing.assert_array_equal(have.accepted, want.accepted)
    np.testing.assert_array_equal(have.following, want.following)


def test_other_generators_are_left_to_jax() -> None:
    p = jnp.full((2, 8), 0.125)
    assert tpu.fits(p, p, jax.random.split(jax.random.key(0), 2))
    assert not tpu.fits(p, p, jax.random.split(jax.random.key(0, impl="rbg"), 2))
    assert not tpu.fits(p.astype(jnp.bfloat16), p.astype(jnp.bfloat16), jax.random.split(jax.random.key(0), 2))
