"""Speculation draws from the target's distribution: one step analytically, joints exactly, the whole loop by counts."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.errors import EffcError
from effc.runtime.cache import Cache
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.program import Program
from effc.runtime.sampling import Sampling
from effc.runtime.speculate import agreed, check_rolls_back, emission, probabilities, residual, reviewed, seen_after

Joint = dict[tuple[int, ...], float]
ONE = np.eye(4, dtype=np.float32)
RANDOM = np.random.default_rng(0).dirichlet(np.ones(4), 6).astype(np.float32)
PAIRS = [
    (RANDOM[0], RANDOM[1]),
    (RANDOM[2], np.asarray([0.5, 0.5, 0, 0], np.float32)),
    (np.asarray([0, 0.3, 0.7, 0], np.float32), RANDOM[3]),
    (ONE[1], RANDOM[4]),
    (RANDOM[5], ONE[2]),
    (ONE[0], ONE[0]),
    (ONE[0], ONE[3]),
    (RANDOM[0], RANDOM[0]),
]


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_one_step_is_exact(p: np.ndarray, q: np.ndarray) -> None:
    beta = np.minimum(p, q).sum()
    left = np.asarray(residual(jnp.asarray(p), jnp.asarray(q)))
    assert np.isfinite(left).all()
    np.testing.assert_allclose(np.minimum(p, q) + (1 - beta) * left, p, atol=1e-6)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_draws_follow_p(p: np.ndarray, q: np.ndarray) -> None:
    """20000 rows of one draft each: the first token emitted has distribution p, the one after its own."""
    rows, key = 20000, jax.random.key(1)
    drafts = jax.random.categorical(key, jnp.log(q), shape=(rows, 1)).astype(jnp.int32)
    ps = jnp.broadcast_to(jnp.stack([p, RANDOM[3]]), (rows, 2, 4))
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 2))(jnp.arange(rows))
    verdict = reviewed(ps, jnp.broadcast_to(q, (rows, 1, 4)), drafts, jnp.ones(rows, jnp.int32), keys)
    first = np.where(verdict.accepted == 1, drafts[:, 0], verdict.following)
    _fits(np.bincount(first, minlength=4), p)
    second = np.asarray(verdict.following)[np.asarray(verdict.accepted) == 1]
    if len(second) > 500:
        _fits(np.bincount(second, minlength=4), RANDOM[3])


def _fits(counts: np.ndarray, p: np.ndarray) -> None:
    """Chi-square at one in ten thousand; what cannot be must not be."""
    assert counts[p == 0].sum() == 0
    expected = counts.sum() * p[p > 0]
    statistic, freedom = ((counts[p > 0] - expected) ** 2 / expected).sum(), (p > 0).sum() - 1
    if freedom:
        # Wilson and Hilferty: the cube root of chi-square over its freedom is nearly normal.
        z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
        assert z < 3.7, (counts, expected)


def _verdicts(p: np.ndarray, q: np.ndarray, drafts: int, there: int, rows: int = 4000) -> Any:
    """A verdict a row on `drafts` places of one p and q each, the first `there` of which hold drafts, and these."""
    key = jax.random.key(2)
    tokens = jax.random.categorical(key, jnp.log(q), shape=(rows, drafts)).astype(jnp.int32)
    ps, qs = (jnp.broadcast_to(x, (rows, n, len(x))) for x, n in ((p, drafts + 1), (q, drafts)))
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), drafts + 1))(jnp.arange(rows))
    return reviewed(ps, qs, tokens, jnp.full(rows, there, jnp.int32), keys), np.asarray(tokens)


@pytest.mark.parametrize(("p", "q"), PAIRS[::3])
def test_a_round_without_drafts_is_plain_decoding(p: np.ndarray, q: np.ndarray) -> None:
    verdict, _ = _verdicts(p, q, drafts=2, there=0)
    assert not np.asarray(verdict.accepted).any()
    _fits(np.bincount(verdict.following, minlength=4), p)


@pytest.mark.parametrize("p", [RANDOM[0], ONE[2], np.asarray([0.5, 0.5, 0, 0], np.float32)])
def test_drafts_from_the_target_itself_all_stand(p: np.ndarray) -> None:
    verdict, _ = _verdicts(p, p, drafts=3, there=3)
    assert (np.asarray(verdict.accepted) == 3).all()
    _fits(np.bincount(verdict.following, minlength=4), p)


@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize(("p", "q"), PAIRS[:3])
def test_tokens_a_round_are_as_many_as_the_product_of_chances_says(p: np.ndarray, q: np.ndarray, drafts: int) -> None:
    """Where drafts are alike: (1 - beta^(G+1)) / (1 - beta) tokens a call, beta the mass that p and q share."""
    verdict, _ = _verdicts(p, q, drafts=drafts, there=drafts)
    beta, emitted = float(np.minimum(p, q).sum()), np.asarray(verdict.accepted) + 1
    wanted = sum(beta**i for i in range(drafts + 1))
    assert abs(emitted.mean() - wanted) <= 4.5 * emitted.std() / len(emitted) ** 0.5 + 1e-4


def test_the_joint_of_rounds_is_exact() -> None:
    """All drafts and verdicts of a bigram pair, V=3: three tokens in rounds of two drafts have p's joint."""
    p, q = (np.random.default_rng(s).dirichlet(np.ones(3), 3) for s in (1, 2))
    paths = itertools.product(range(3), repeat=3)
    want = {x: float(np.prod([p[a, b] for a, b in itertools.pairwise((0, *x))])) for x in paths}
    got: Joint = defaultdict(float)
    _rounds(p, q, (), 1.0, got)
    assert sum(got.values()) == pytest.approx(1, abs=1e-6)
    assert {x: got[x] for x in want} == pytest.approx(want, abs=1e-6)


def _rounds(
    p: np.ndarray,
    q: np.ndarray,
    said: tuple[int, ...],
    chance: float,
    out: dict[tuple[int, ...], float],
    drafted: int = 0,
) -> None:
    """Every way on from `said`, of whose last tokens `drafted` are drafts of this round that stand."""
    if len(said) >= 3:
        out[said[:3]] += chance  # what a draft has past the third does not count
        return
    before = said[-1] if said else 0
    if drafted == 2:
        for y in range(3):
            _rounds(p, q, (*said, y), chance * p[before, y], out)
        return
    left = np.asarray(residual(jnp.asarray(p[before]), jnp.asarray(q[before])))
    for x in range(3):
        stands = min(1.0, p[before, x] / q[before, x])
        _rounds(p, q, (*said, x), chance * q[before, x] * stands, out, drafted + 1)
        for y in range(3):
            _rounds(p, q, (*said, y), chance * q[before, x] * (1 - stands) * float(left[y]), out)


def test_drafts_that_are_no_draw_stand_where_the_target_agrees() -> None:
    chosen = jnp.asarray([[1, 2, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4]])
    drafts = jnp.asarray([[1, 2, 0], [1, 2, 3], [1, 2, 3]])
    verdict = agreed(chosen, drafts, jnp.asarray([3, 2, 3]))
    assert verdict.accepted.tolist() == [2, 2, 0] and verdict.following.tolist() == [3, 3, 9]


def test_emission_ends_at_stops_and_where_nothing_is_left() -> None:
    drafts = jnp.asarray([[1, 2, 3]] * 4)
    verdict = agreed(jnp.asarray([[1, 2, 3, 4]] * 4), drafts, jnp.asarray([3, 3, 3, 1]))
    given = emission(verdict, drafts, jnp.asarray([2]), jnp.asarray([9, 1, 0, 9]))
    assert given.count.tolist() == [2, 1, 0, 2] and given.ended.tolist() == [True, False, False, True]
    assert given.shown().tolist() == [[1, -1, -1, -1], [1, -1, -1, -1], [-1] * 4, [1, -1, -1, -1]]
    assert given.last(jnp.asarray([7] * 4)).tolist() == [2, 1, 7, 2]


def test_what_was_seen_grows_along_a_draft() -> None:
    seen = seen_after(jnp.zeros((1, 5), bool), jnp.asarray([[3, 1]]))
    assert seen is not None and seen[0].astype(int).tolist() == [[0] * 5, [0, 0, 0, 1, 0], [0, 1, 0, 1, 0]]


def test_a_cache_that_cannot_roll_back_is_refused() -> None:
    state: Any = jnp.zeros(3)
    with pytest.raises(EffcError, match=r"entry 0 is a .*, which cannot be rolled back, want rows a token"):
        check_rolls_back(Cache(jnp.zeros(1, jnp.int32), (state,)))


# ---- the whole loop on a toy: what follows depends on the token before and on the position

V, LENGTH = 4, 3
TARGET, DRAFT = (jnp.asarray(np.random.default_rng(s).standard_normal((8, V, V)), jnp.float32) for s in (5, 6))


def toy(table: jax.Array) -> Any:
    def extend(params: Any, tokens: jax.Array, cache: Cache | None = None, valid: Any = None) -> Any:
        start = jnp.zeros(tokens.shape[0], jnp.int32) if cache is None else cache.lengths
        at = jnp.minimum(start[:, None] + jnp.arange(tokens.shape[1])[None, :], 7)
        logits = table[at, tokens]
        if valid is not None:
            logits = jnp.take_along_axis(logits, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)
        return logits, Cache(start + (tokens.shape[1] if valid is None else valid), ())

    return extend


DECODE = {
    "strategy": "speculative", "kind": "model", "drafter": "draft", "gamma": 2, "cost": 0.0,
    "curve": (1.0, 1.0, 1.0), "acceptance": (0.99,) * 11,
}  # fmt: skip


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(temperature=1.3), id="plain", marks=pytest.mark.slow),
        pytest.param(Sampling(temperature=0.9, top_k=3), id="top_k", marks=pytest.mark.slow),
        pytest.param(Sampling(temperature=1.5, top_k=3, top_p=0.8, min_p=0.1), id="filters"),
    ],
)
def test_samples_of_the_loop_have_the_joint_of_the_target(sampling: Sampling) -> None:
    engine = Engine(Program(toy(TARGET), {}, None, {"draft": toy(DRAFT)}, DECODE), {})
    result = generate(engine, [[1]] * 20000, max_new_tokens=LENGTH + 1, sampling=sampling, seed=4)
    rows = np.asarray(result.tokens)
    assert result.stats.draft is not None and 0 < result.stats.draft.accepted < result.stats.draft.drafted
    probs = np.asarray(probabilities(TARGET, sampling.numbers(), sampling.filters))
    joint = np.zeros((V,) * (LENGTH + 1))
    for path in itertools.product(range(V), repeat=LENGTH + 1):
        joint[path] = np.prod([probs[i, a, b] for i, (a, b) in enumerate(itertools.pairwise((1, *path)))])
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(rows.T), 1)
    likely = joint.ravel() * len(rows) >= 5
    assert counts.ravel()[joint.ravel() == 0].sum() == 0
    pooled = np.append(counts.ravel()[likely], counts.ravel()[~likely].sum())
    _fits(pooled, np.append(joint.ravel()[likely], joint.ravel()[~likely].sum()))


def test_rows_do_not_depend_on_each_other_when_drafts_are_drawn() -> None:
    engine = Engine(Program(toy(TARGET), {}, None, {"draft": toy(DRAFT)}, DECODE), {})
    how = Sampling(temperature=1.0)
    many = generate(engine, [[1], [2, 3], [0]], max_new_tokens=20, sampling=how, seed=2).tokens
    assert generate(engine, [[1]], max_new_tokens=20, sampling=how, seed=2).tokens == many[:1]
