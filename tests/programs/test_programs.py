"""Programs, handlers and traces on distributions without a model (algorithms 6.1, 6.4)."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import pytest

from effc.errors import EffcError
from effc.programs import (
    Bernoulli,
    Categorical,
    Choose,
    Constant,
    Distribution,
    Memo,
    factor,
    forward,
    handlers,
    keys,
    log,
    observe,
    param,
    program,
    reject,
    sample,
    tool,
    uniform,
)
from effc.programs.trace import Trace

Steps = Generator[Any, Any, Any]


@program
def inner(p: float) -> Steps:
    first = yield sample(Bernoulli(p), "coin")
    second = yield sample(uniform(range(1000)), "number")
    return first, second


@program
def outer() -> Steps:
    scale = yield param("scale", 0.5)
    one = yield inner(scale)
    two = yield inner(scale).named("again")
    yield log((one, two), "both")
    yield factor(-0.25, "penalty")
    yield observe(Categorical({"a": 1, "b": 3}), "b", "letter")
    return one, two


def test_a_trace_records_every_effect_under_its_scope() -> None:
    trace = handlers.trace(outer(), 1)
    kinds = [(r.name, r.kind) for r in trace.records]
    assert kinds == [
        ("scale", "param"), ("inner/coin", "sample"), ("inner/number", "sample"), ("inner", "return"),
        ("again/coin", "sample"), ("again/number", "sample"), ("again", "return"), ("both", "log"),
        ("penalty", "factor"), ("letter", "observe"),
    ]  # fmt: skip
    assert trace.value == trace["both"] == (trace["inner"], trace["again"])
    assert trace["inner"] == (trace["inner/coin"], trace["inner/number"])
    assert "letter" in str(trace) and len(str(trace).splitlines()) == 11
    assert trace.json()["records"][9]["value"] == "b"


def test_a_score_is_the_sum_of_what_was_sampled_and_observed() -> None:
    trace = handlers.trace(outer(), 1)
    want = 2 * (math.log(0.5) + math.log(1 / 1000)) - 0.25 + math.log(0.75)
    assert trace.score == pytest.approx(want) and trace.weight == pytest.approx(-0.25 + math.log(0.75))


def test_sites_have_keys_of_their_own_by_name() -> None:
    trace = handlers.trace(outer(), 1)
    assert trace["inner/number"] != trace["again/number"]
    root = keys.root(1)
    assert keys.at(root, "a") != keys.at(root, "b") != root
    want = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 7), 2**32 - 1))
    assert keys.fold(root, 7, 2**32 - 1) == tuple(int(word) for word in np.asarray(want))
    assert keys.root(jax.random.key(1)) == keys.root(jax.random.PRNGKey(1)) == root


def test_a_seed_gives_one_trace_and_more_samples_begin_with_fewer() -> None:
    few, many = forward(outer(), 3, seed=9), forward(outer(), 8, seed=9)
    assert [t.records for t in few] == [t.records for t in many][:3]
    assert len({t["inner/number"] for t in many}) > 5
    assert [t.records for t in forward(outer(), 8, seed=9, together=False)] == [t.records for t in many]
    assert forward(outer(), 3, seed=10)[0].records != few[0].records


# ---- handlers


def test_replay_is_exact_and_draws_nothing() -> None:
    trace = handlers.trace(outer(), 1)
    again = handlers.trace(handlers.replay(outer(), trace), 2)
    assert again.records == trace.records and again.score == trace.score and again.weight == trace.weight
    partial = {name: record for name, record in trace.sites.items() if name.startswith("inner/")}
    other = handlers.trace(handlers.replay(outer(), partial), 2)
    assert other["inner"] == trace["inner"] and other["again"] != trace["again"]


def test_replay_under_another_distribution_keeps_the_value_and_scores_it_anew() -> None:
    @program
    def coin(p: float) -> Steps:
        return (yield sample(Bernoulli(p), "x"))

    trace = handlers.trace(coin(0.9), 0)
    again = handlers.trace(handlers.replay(coin(0.4), trace), 0)
    assert again.value == trace.value
    assert again.score == pytest.approx(math.log(0.4 if trace.value else 0.6))
    assert again.weight == pytest.approx(again.score - trace.score)


def test_condition_makes_a_sample_an_observation() -> None:
    trace = handlers.trace(handlers.condition(outer(), {"inner/coin": True}), 1)
    record = trace.sites["inner/coin"]
    assert (record.kind, record.value) == ("observe", True)
    assert trace.weight == pytest.approx(math.log(0.5) - 0.25 + math.log(0.75))
    inside = handlers.condition(inner(0.2), {"coin": False})

    @program
    def around() -> Steps:
        return (yield inside)

    assert handlers.trace(around(), 1).weight == pytest.approx(math.log(0.8))
    with pytest.raises(EffcError, match=r"condition: no site 'inner/coyn' in this run; did you mean 'inner/coin'"):
        handlers.trace(handlers.condition(outer(), {"inner/coyn": True}))
    handlers.trace(handlers.condition(outer(), {"elsewhere": True}, strict=False))
    with pytest.raises(EffcError, match="condition: 'penalty' is a factor, want a sample"):
        handlers.trace(handlers.condition(outer(), {"penalty": 0}))


def test_block_hides_sites_from_the_trace_and_from_outer_handlers() -> None:
    whole, hidden = handlers.trace(outer(), 1), handlers.trace(handlers.block(outer(), "inner/number"), 1)
    assert "inner/number" not in hidden and hidden.value == whole.value
    assert hidden.score == pytest.approx(whole.score + math.log(1000))
    assert "inner/coin" in hidden and not handlers.trace(handlers.block(outer())).records
    unseen = handlers.condition(handlers.block(outer(), "inner/number"), {"inner/number": 3})
    assert handlers.trace(unseen, 1)["inner"] == whole["inner"]


def test_param_and_seed() -> None:
    assert handlers.trace(handlers.param(outer(), {"scale": 1.0}))["inner/coin"] is True
    with pytest.raises(EffcError, match="param: no site 'skale' in this run; did you mean 'scale'"):
        handlers.trace(handlers.param(outer(), {"skale": 1.0}))
    fixed = handlers.seed(inner(0.5), 7)

    @program
    def around() -> Steps:
        return (yield fixed)

    assert handlers.trace(around(), 1).value == handlers.trace(around(), 2).value == handlers.trace(fixed, 3).value

    @program
    def bare() -> Steps:
        yield param("k")

    with pytest.raises(EffcError, match="param: 'k' has no value"):
        handlers.trace(bare())


# ---- rejection, tools, memo


def test_reject_ends_the_trace_there() -> None:
    ran: list[str] = []

    @program
    def stops() -> Steps:
        yield sample(Bernoulli(0.5), "x")
        yield reject("no good")
        ran.append("after")
        yield sample(Bernoulli(0.5), "y")

    @program
    def around() -> Steps:
        yield stops()
        ran.append("outside")
        yield sample(Bernoulli(0.5), "z")

    trace = handlers.trace(around())
    assert ran == [] and [r.name for r in trace.records] == ["stops/x", "stops/reject1"]
    assert (trace.score, trace.weight, trace.rejected, trace.value) == (-math.inf, -math.inf, "no good", None)


def test_what_cannot_be_ends_the_trace_too() -> None:
    @program
    def impossible() -> Steps:
        yield observe(Constant("a"), "b", "seen")
        yield sample(Bernoulli(0.5), "never")

    trace = handlers.trace(impossible())
    assert [r.name for r in trace.records] == ["seen"] and trace.weight == -math.inf
    assert trace.rejected == "seen: 'b' cannot be"
    with pytest.raises(EffcError, match=r"each of 2 traces has weight 0 \(seen: 'b' cannot be\)"):
        forward(impossible(), 2).posterior()


def test_a_tool_runs_once_and_its_failure_rejects() -> None:
    calls: list[str] = []

    def parse(text: str) -> int:
        calls.append(text)
        return int(text)

    @program
    def reads(text: str) -> Steps:
        return (yield sample(tool(parse, text, rejects=(ValueError,)), "parsed"))

    trace = handlers.trace(reads("12"))
    assert trace.value == 12 and trace.score == 0 and calls == ["12"]
    assert handlers.trace(handlers.replay(reads("12"), trace)).value == 12 and calls == ["12"]
    assert "parse: ValueError" in str(handlers.trace(reads("x")).rejected)
    with pytest.raises(TypeError):
        handlers.trace(reads(None))  # type: ignore[arg-type]


def test_memo_draws_once_a_trace() -> None:
    @program
    def recalls() -> Steps:
        first = yield sample(Memo(uniform(range(1000))), "first")
        second = yield sample(Memo(uniform(range(1000))), "second")
        third = yield sample(Memo(uniform(range(999))), "third")
        return first == second, first == third

    trace = handlers.trace(recalls())
    assert trace.value == (True, False)
    assert trace.score == pytest.approx(-math.log(1000) - math.log(999))


# ---- distributions


@pytest.mark.parametrize(
    ("dist", "values"),
    [
        (Bernoulli(0.3), [True, False]),
        (Categorical({"a": 1, "b": 0, "c": 2}), ["a", "b", "c"]),
        (uniform("aab"), ["a", "b"]),
        (Choose("abc", 2), [tuple(p) for p in ("ab", "ac", "ba", "bc", "ca", "cb")]),
        (Choose("abc", 2, (1, 5, 2)), [tuple(p) for p in ("ab", "ac", "ba", "bc", "ca", "cb")]),
        (Choose("abc", 1, (0, 5, 2)), [("a",), ("b",), ("c",)]),
        (Constant(3), [3, 4]),
    ],
    ids=lambda x: "" if isinstance(x, list) else type(x).__name__,
)
def test_draws_are_as_often_as_their_probability(dist: Distribution, values: list[Any]) -> None:
    p = np.asarray([math.exp(dist.log_prob(value)) for value in values])
    assert p.sum() == pytest.approx(1)
    draws = [dist.sample(seed) for seed in range(800)]
    counts = np.asarray([sum(draw.value == value for draw in draws) for value in values])
    assert counts.sum() == len(draws)
    assert np.all(np.abs(counts - 800 * p) <= 4.5 * np.sqrt(800 * p * (1 - p)) + 1e-9)
    assert all(draw.score == draw.proposal == dist.log_prob(draw.value) for draw in draws[:5])


def test_what_no_distribution_can_be_is_refused() -> None:
    for make, message in [
        (lambda: Bernoulli(1.2), "Bernoulli: p is 1.2, want 0 to 1"),
        (lambda: Categorical({}), "Categorical: weights"),
        (lambda: Categorical({"a": -1.0}), "want numbers of 0 or more"),
        (lambda: Choose("ab", 3), "Choose: k is 3, want 0 to 2"),
        (lambda: Choose("ab", 2, (1, 0)), "Choose: k is 2, want 0 to 1"),
        (lambda: Choose("aba", 2), "option 'a' is there twice"),
        (lambda: Choose("ab", 1, (1,)), "want 2 numbers of 0 or more"),
    ]:
        with pytest.raises(EffcError, match=message):
            make()
    assert Choose("abc", 2).log_prob(("a", "a")) == -math.inf


# ---- what is written wrongly


def test_mistakes_in_programs_are_told() -> None:
    @program
    def twice() -> Steps:
        yield sample(Bernoulli(0.5), "x")
        yield sample(Bernoulli(0.5), "x")

    @program
    def number() -> Steps:
        yield 3

    @program
    def uncalled() -> Steps:
        yield inner

    @program
    def no_dist() -> Steps:
        yield sample("abc", "x")  # type: ignore[arg-type]

    for bound, message in [
        (twice(), "program twice: two effects named 'x', want names that differ"),
        (number(), "program number: yielded 3, want an effect"),
        (uncalled(), r"want an effect .*yielded called, as `yield inner\(x\)`"),
        (no_dist(), "x: 'abc', want a distribution"),
    ]:
        with pytest.raises(EffcError, match=message):
            handlers.trace(bound)
    with pytest.raises(EffcError, match="program abs: no yield in it, want a generator function"):
        program(abs)  # type: ignore[arg-type]

    with pytest.raises(EffcError, match=r"program inner: missing a required argument: 'p', want inner\(p"):
        inner()
    with pytest.raises(EffcError, match="no effect 'cion', want one of 2; did you mean 'coin'"):
        handlers.trace(inner(0.5))["cion"]
    with pytest.raises(EffcError, match="factor odd: the score is nan, want a log weight"):
        factor(math.nan, "odd")
    with pytest.raises(EffcError, match="forward: n is 0, want at least 1"):
        forward(inner(0.5), 0)


def test_effects_without_names_are_numbered() -> None:
    @program
    def plain() -> Steps:
        yield sample(Bernoulli(0.5))
        yield sample(Bernoulli(0.5))
        yield log("x")

    trace: Trace = handlers.trace(plain())
    assert [r.name for r in trace.records] == ["sample1", "sample2", "log1"]
