"""The speculative loop with a deferral rule: texts follow the rule's distribution, whatever is drafted and when."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.errors import EffcError
from effc.runtime.deferral import RULES, Own, mixed, variation
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.program import Program
from effc.runtime.sampling import Sampling
from effc.runtime.speculate import probabilities, residual
from tests.runtime.test_speculate import DECODE, DRAFT, LENGTH, TARGET, Joint, V, _fits, toy

ALPHA = {"chow": 0.5, "diff": 0.1, "opt": 0.3, "tokenv1": 0.2, "tokenv2": 0.2, "tokenv3": 0.5, "lossy": 0.3}
"""Alphas at which the toy's models both have a say."""

LEFT, RIGHT = (np.random.default_rng(s).dirichlet(np.ones(3), 3).astype(np.float32) for s in (1, 2))
MORE = pytest.mark.slow


def cascade(rule: str, alpha: float, **decode: Any) -> Engine:
    told = {**DECODE, "rule": rule, "alpha": alpha, **decode}
    return Engine(Program(toy(TARGET), {}, None, {"draft": toy(DRAFT)}, told), {})


def pi_of(rule: str, alpha: float, p: np.ndarray, q: np.ndarray, own_p: Any = None, own_q: Any = None) -> np.ndarray:
    large, small = jnp.asarray(p), jnp.asarray(q)
    own = Own(large if own_p is None else own_p, small if own_q is None else own_q, variation(large, small))
    at = jnp.full((*p.shape[:-1], 1), alpha)
    return np.asarray(mixed(rule, at, large, small, own)[0])


def slow_but(*quick: str) -> list[Any]:
    return [rule if rule in quick else pytest.param(rule, marks=MORE) for rule in RULES]


@pytest.mark.parametrize("rule", RULES)
def test_the_joint_of_rounds_is_exact(rule: str) -> None:
    """All drafts and verdicts of a bigram pair, V=3, three tokens: rounds of up to two drafts have pi's joint."""
    pi = pi_of(rule, ALPHA[rule], LEFT, RIGHT)
    left = np.asarray(residual(jnp.asarray(pi), jnp.asarray(RIGHT)))
    want = {
        x: float(np.prod([pi[a, b] for a, b in itertools.pairwise((0, *x))]))
        for x in itertools.product(range(3), repeat=3)
    }
    got: Joint = defaultdict(float)
    _rounds(pi, RIGHT, left, (), 1.0, got)
    assert {x: got[x] for x in want} == pytest.approx(want, abs=1e-6)
    assert sum(got.values()) == pytest.approx(1, abs=1e-5)


def _rounds(
    pi: np.ndarray, q: np.ndarray, left: np.ndarray, said: tuple[int, ...], chance: float, out: Joint, drafted: int = 0
) -> None:
    """As the loop does: the token after the last draft is drawn from its own pi."""
    if len(said) >= 3:
        out[said[:3]] += chance
        return
    before = said[-1] if said else 0
    if drafted == 2:
        for y in range(3):
            _rounds(pi, q, left, (*said, y), chance * pi[before, y], out)
        return
    for x in range(3):
        stands = min(1.0, pi[before, x] / q[before, x])
        _rounds(pi, q, left, (*said, x), chance * q[before, x] * stands, out, drafted + 1)
        for y in range(3):
            _rounds(pi, q, left, (*said, y), chance * q[before, x] * (1 - stands) * float(left[before, y]), out)


FILTERS = Sampling(temperature=1.4, top_k=3, min_p=0.05)


@pytest.mark.parametrize("rule", slow_but("tokenv3"))
def test_samples_of_the_loop_have_the_joint_of_the_rule(rule: str) -> None:
    """20000 texts; the rule looks at probabilities without temperature and filters, draws with them."""
    engine = cascade(rule, ALPHA[rule])
    result = generate(engine, [[1]] * 20000, max_new_tokens=LENGTH + 1, sampling=FILTERS, seed=4)
    rows, told = np.asarray(result.tokens), result.stats.draft
    assert told is not None and 0 < told.accepted < told.drafted and 0 < (told.deferral or 0) < 1
    p, q = (np.asarray(probabilities(t, FILTERS.numbers(), FILTERS.filters)) for t in (TARGET, DRAFT))
    pi = pi_of(rule, ALPHA[rule], p, q, jax.nn.softmax(TARGET, axis=-1), jax.nn.softmax(DRAFT, axis=-1))
    assert np.abs(pi - p).max() > 0.1
    joint = np.zeros((V,) * (LENGTH + 1))
    for path in itertools.product(range(V), repeat=LENGTH + 1):
        steps = itertools.pairwise((1, *path))  # the first token comes with the prompt, from the target
        joint[path] = np.prod([(pi if i else p)[i, a, b] for i, (a, b) in enumerate(steps)])
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(rows.T), 1)
    likely = joint.ravel() * len(rows) >= 5
    assert counts.ravel()[joint.ravel() == 0].sum() == 0
    pooled = np.append(counts.ravel()[likely], counts.ravel()[~likely].sum())
    _fits(pooled, np.append(joint.ravel()[likely], joint.ravel()[~likely].sum()))


def greedy_text(rule: str, alpha: float, prompt: int, length: int) -> tuple[list[int], int]:
    """Token by token, both models at every position; and how many were left to the target."""
    out, deferred = [int(TARGET[0, prompt].argmax())], 0
    while len(out) < length:
        at = min(len(out), 7), out[-1]
        logits_p, logits_q = TARGET[at], DRAFT[at]
        ones_p, ones_q = np.eye(V, dtype=np.float32)[[int(logits_p.argmax()), int(logits_q.argmax())]]
        soft = jax.nn.softmax(logits_p), jax.nn.softmax(logits_q)
        if rule == "lossy":
            rule = "tokenv3"
        pi = pi_of(rule, alpha, ones_p, ones_q, *soft)
        tv = jnp.asarray([float(not (ones_p == ones_q).all())])
        kept = np.asarray(RULES[rule](Own(*soft, tv), jnp.asarray([alpha])))
        kept = bool(kept[ones_q.argmax() if rule.startswith("token") else 0])
        out.append(int(pi.argmax()))
        deferred += not kept
    return out, deferred


NEVER = {"cost": 9.0, "acceptance": (0.01,) * 11}
"""What makes drafts look too dear to send."""


@pytest.mark.parametrize("rule", slow_but("opt"))
@pytest.mark.parametrize("decode", [{}, pytest.param(NEVER, marks=MORE)], ids=["eager", "never"])
def test_greedy_text_is_the_rule_applied_at_every_position(rule: str, decode: dict[str, Any]) -> None:
    """So it does not depend on how much is drafted."""
    prompts = [[i % V] for i in range(V)]
    wanted = [greedy_text(rule, ALPHA[rule], prompt[0], 12) for prompt in prompts]
    assert len({tuple(text) for text, _ in wanted}) > 1
    got = generate(cascade(rule, ALPHA[rule], **decode), prompts, max_new_tokens=12, chunk=5)
    assert got.tokens == [text for text, _ in wanted]
    told = got.stats.draft
    assert told and told.deferral == pytest.approx(sum(n for _, n in wanted) / (11 * V))
    assert (told.drafted > 0) == (not decode)


WAYS = [
    pytest.param(Sampling(), id="greedy"), pytest.param(Sampling(temperature=1.2, top_k=3), id="drawn", marks=MORE)
]  # fmt: skip


@pytest.mark.parametrize("sampling", WAYS)
def test_a_rule_that_defers_always_is_the_plain_drafter(sampling: Sampling) -> None:
    """Token for token, drafts and their counts as well; and the same drafter without the rule."""
    plain = Engine(Program(toy(TARGET), {}, None, {"draft": toy(DRAFT)}, DECODE), {})
    prompts = [[1], [2, 3], [0]]
    want = generate(plain, prompts, max_new_tokens=24, sampling=sampling, seed=3)
    got = generate(cascade("diff", -1.0), prompts, max_new_tokens=24, sampling=sampling, seed=3)
    assert got.tokens == want.tokens and got.stats.draft and want.stats.draft
    assert got.stats.draft.deferral == 1 and want.stats.draft.deferral is None
    for name in ("calls", "drafted_at", "accepted_at", "emitted", "rounds"):
        assert getattr(got.stats.draft, name) == getattr(want.stats.draft, name)


@MORE
@pytest.mark.parametrize("rule", ["tokenv3", "opt", "lossy"])
def test_a_cascade_that_is_switched_off_draws_as_if_it_were_not_there(rule: str) -> None:
    """The stream of random numbers stays: alpha=-inf gives the plain drafter's samples, whatever ran before."""
    plain = Engine(Program(toy(TARGET), {}, None, {"draft": toy(DRAFT)}, DECODE), {})
    prompts, engine = [[1], [2, 3], [0]], cascade(rule, ALPHA[rule])
    how = {"max_new_tokens": 24, "sampling": Sampling(temperature=1.2, top_k=3), "seed": 3}
    want, on = generate(plain, prompts, **how), generate(engine, prompts, **how)
    off = generate(engine, prompts, alpha=-float("inf"), **how)
    assert off.tokens == want.tokens
    assert on.tokens != want.tokens and generate(engine, prompts, **how).tokens == on.tokens


@MORE
def test_past_what_is_certified_and_for_samples_the_target_speaks_alone() -> None:
    plain = Engine(Program(toy(TARGET), {}), {})
    certified = cascade("tokenv3", 1.0, delta=0.1, tokens=6)
    free, want = cascade("tokenv3", 1.0), generate(plain, [[1]], max_new_tokens=12).tokens[0]
    begun = generate(free, [[1]], max_new_tokens=12).tokens[0][:6]
    rest = generate(plain, [[1, *begun]], max_new_tokens=6).tokens[0]
    assert begun != want[:6] and generate(certified, [[1]], max_new_tokens=12).tokens[0] == [*begun, *rest]
    drawn = generate(certified, [[1]], max_new_tokens=12, sampling=Sampling(temperature=1.0), seed=1)
    assert drawn.stats.draft and drawn.stats.draft.deferral == 1
    assert certified.speculation and certified.speculation.cascade
    asked = replace(certified.speculation, cascade=replace(certified.speculation.cascade, asked=1.0))
    certified.speculation = asked
    assert generate(certified, [[1]], max_new_tokens=12).tokens == generate(free, [[1]], max_new_tokens=12).tokens


def test_alone_the_small_model_goes_on_until_the_rule_defers() -> None:
    """Token for token the same text; the large model is called for what is deferred, and once a full draft."""
    told = {"gamma": 6, "curve": (1.0,) * 7, "cost": 9.0}
    alone = cascade("chow", 0.6, strategy="cascade", level="token", **told)
    text, deferred = greedy_text("chow", 0.6, 1, 40)
    got = generate(alone, [[1]], max_new_tokens=40)
    assert got.tokens == [text] and got.stats.draft
    assert deferred <= got.stats.draft.calls <= deferred + 39 // 7 + 1
    assert got.stats.draft.accepted == got.stats.draft.drafted
    assert generate(alone, [[1]], max_new_tokens=40, exits=0.4).tokens == [text]
    large = Engine(Program(toy(TARGET), {}), {})
    assert (
        generate(alone, [[1]], max_new_tokens=40, exits=1.0).tokens == generate(large, [[1]], max_new_tokens=40).tokens
    )


def test_a_drafter_that_copies_has_nothing_to_weigh() -> None:
    with pytest.raises(EffcError, match="kind=lookup has no distribution for a rule"):
        cascade("tokenv3", 0.5, kind="lookup")
    with pytest.raises(EffcError, match=r"no rule 'tokenv4', want .*did you mean 'tokenv[123]'"):
        cascade("tokenv4", 0.5)
