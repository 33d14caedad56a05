"""Routers: who goes on, what training takes for granted, what the losses pull at."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.runtime.routing import Routing, admitted, balance, best, train

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 12, 5)), jnp.float32)
W = jnp.asarray(RNG.standard_normal((1, 5)), jnp.float32)
ALL = jnp.ones((2, 12), bool)


def test_a_token_goes_on_where_its_score_is_above_a_half_and_it_was_on() -> None:
    before = jnp.asarray(RNG.integers(0, 2, (2, 12)), bool)
    choice = Routing(W, "expert", (1.0, 0.5), 0.0).choose(1, X, X, before)
    np.testing.assert_array_equal(choice.on, before & (jax.nn.sigmoid(X @ W[0]) > 0.5))
    assert choice.gate is None
    gated = Routing(W, "expert", (1.0, 0.5), 0.1).choose(1, X, X, before).gate
    assert gated is not None
    np.testing.assert_allclose(gated, 0.1 * jax.nn.sigmoid(X @ W[0]), rtol=1e-5)


def test_training_takes_the_best_share_of_those_that_were_on() -> None:
    score = X @ W[0]
    chosen = best(score, ALL, 0.5)
    assert chosen.sum(axis=1).tolist() == [6, 6]
    for row in range(2):
        assert score[row][chosen[row]].min() >= score[row][~chosen[row]].max()
    few = ALL.at[:, 3:].set(False)
    assert best(score, few, 0.5).sum(axis=1).tolist() == [3, 3]  # no more than were on


def test_training_is_told_of_and_ends() -> None:
    routing = lambda told: Routing(W, "expert", (1.0, 0.5), 0.0, told)  # noqa: E731
    with train([jnp.float32(1), jnp.float32(0.25)]) as told:
        choice = routing(told).choose(1, X, X, ALL)
    assert choice.on.sum(axis=1).tolist() == [3, 3]
    assert float(told.shares[0]) == pytest.approx(0.25)
    assert choice.gate is not None
    np.testing.assert_allclose(choice.gate, 1.0)  # values as if there were no gate, gradients as if there were
    (loss,) = told.losses
    wanted = -jnp.where(choice.on, jax.nn.log_sigmoid(X @ W[0]), jax.nn.log_sigmoid(-(X @ W[0]))).mean()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_routers_learn_from_what_recursion_is_worth() -> None:
    def loss(w: jax.Array) -> jax.Array:
        with train([jnp.float32(1), jnp.float32(1)]) as told:
            gate = Routing(w, "expert", (1.0, 0.5), 0.0, told).choose(1, X, X, ALL).gate
        assert gate is not None
        return jnp.sum(gate * X[..., 0])  # tokens with a large first number had better not go on

    assert float(jax.grad(loss)(jnp.zeros((1, 5)))[0, 0]) > 0.1


def test_token_choice_gives_each_token_its_runs_and_ties_go_deep() -> None:
    w = jnp.asarray(RNG.standard_normal((3, 5)), jnp.float32)
    routing = Routing(w, "token", (1.0, 1.0, 1.0), 0.0)
    runs = 1 + jnp.argmax(X @ w.T, axis=-1)
    first = routing.choose(1, X, X, ALL).on
    second = routing.choose(2, X, X, first).on
    np.testing.assert_array_equal(1 + first.astype(int) + second, runs)
    assert bool(Routing(w * 0, "token", (1.0, 1.0, 1.0), 0.0).choose(2, X, X, ALL).on.all())


def test_balance_is_least_where_all_runs_are_as_likely() -> None:
    even, chosen = jnp.zeros((1, 6, 3)), jnp.asarray([[0, 1, 2, 0, 1, 2]])
    assert float(balance(even, chosen, ALL[:1, :6])) == pytest.approx(1.0)
    one = even.at[..., 0].set(9.0)
    assert float(balance(one, chosen * 0, ALL[:1, :6])) > 2.9


@pytest.mark.parametrize("cut", [1, 4, 11])
def test_room_does_not_depend_on_how_a_text_is_cut(cut: int) -> None:
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    none = jnp.zeros(2, jnp.int32)
    whole = admitted(ALL, none, positions, 0.25, 1)
    assert whole.sum(axis=1).tolist() == [4, 4]  # a quarter of twelve and one more
    start = admitted(ALL[:, :cut], none, positions[:, :cut], 0.25, 1)
    rest = admitted(ALL[:, cut:], start.sum(axis=1, dtype=jnp.int32), positions[:, cut:], 0.25, 1)
    np.testing.assert_array_equal(jnp.concatenate([start, rest], axis=1), whole)
