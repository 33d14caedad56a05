"""Inference against enumeration on a program of two latent values and a table for a model (algorithms 6.4)."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest

from effc.errors import EffcError
from effc.programs import (
    LM,
    Bernoulli,
    Categorical,
    beam,
    factor,
    forward,
    handlers,
    likelihood_weighting,
    observe,
    program,
    reject,
    rejection,
    sample,
    sequential,
)
from effc.programs.calls import Answer, Call, Drawing, Drawn, Model, Scored, Usage
from effc.programs.keys import rng

Steps = Generator[Any, Any, Any]

AFTER = {"<": [0.5, 0.3, 0.2], "a": [0.2, 0.6, 0.2], "b": [0.1, 0.1, 0.8], "c": [0.4, 0.5, 0.1]}
LETTERS = "abc"


class Table(Model):
    """A language model of three letters: each depends on the one before it."""

    def __init__(self) -> None:
        self.usage, self.speller = Usage(), "letters"
        self.batches: list[int] = []

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def spell(self, prompt: str, ids: Sequence[int], value: str) -> tuple[int, ...]:
        return tuple(map(ord, value))

    def check(self, prompt: Sequence[int], new: int) -> None:
        assert prompt and new

    def answer(self, calls: Sequence[Call]) -> list[Answer]:
        self.batches.append(len(calls))
        return [self._draw(call) if isinstance(call, Drawing) else self._score(call) for call in calls]

    def _draw(self, call: Drawing) -> Answer:
        text, random = "", rng(call.key)
        for _ in range(call.how.max_tokens):
            p = np.asarray(AFTER[(chr(call.prompt[-1]) + text)[-1]]) ** (1 / call.how.sampling.temperature)
            text += LETTERS[random.choice(3, p=p / p.sum())]
        return Drawn(tuple(map(ord, text)), "length", text, len(text))

    def _score(self, call: Any) -> Answer:
        letters = chr(call.prompt[-1]) + "".join(map(chr, call.ids))
        model, proposal = [], 0.0
        for before, letter in itertools.pairwise(letters):
            p = np.asarray(AFTER[before])
            q = p ** (1 / call.sampling.temperature)
            model.append(math.log(p[LETTERS.index(letter)]))
            proposal += math.log(q[LETTERS.index(letter)] / q.sum())
        return Scored(tuple(model), proposal, 1)


@pytest.fixture
def lm() -> LM:
    return LM(Table())


SEEN = {"a": 0.9, "b": 0.2, "c": 0.5}


@program
def toy(lm: LM, temperature: float = 1.0) -> Steps:
    """Two latent letters and an answer that depends on both."""
    first = yield sample(lm("<", max_tokens=1, temperature=temperature), "first")
    yield observe(Bernoulli(SEEN[first]), True, "clue")
    second = yield sample(lm(f"<{first}", max_tokens=1, temperature=temperature), "second")
    yield observe(Categorical({first: 1.0, second: 2.0, "x": 1.0}), "b", "answer")
    return first + second


def exact() -> tuple[dict[str, float], float]:
    """Posterior of what it returns, and the probability of the observations, by enumeration."""
    joint = {}
    for first, second in itertools.product(LETTERS, LETTERS):
        prior = AFTER["<"][LETTERS.index(first)] * AFTER[first][LETTERS.index(second)]
        answer = {}
        for value, weight in ((first, 1.0), (second, 2.0), ("x", 1.0)):
            answer[value] = weight  # a dict literal too keeps the last of equal keys
        joint[first + second] = prior * SEEN[first] * answer.get("b", 0.0) / sum(answer.values())
    total = sum(joint.values())
    return {value: p / total for value, p in joint.items() if p}, total


def far(found: dict[str, float]) -> float:
    """Total variation from the exact posterior."""
    want, _ = exact()
    return sum(abs(found.get(v, 0.0) - want.get(v, 0.0)) for v in {*found, *want}) / 2


def test_likelihood_weighting_is_enumeration(lm: LM) -> None:
    samples = likelihood_weighting(toy(lm), 1500, seed=1)
    assert far(samples.posterior()) < 0.03
    assert math.exp(samples.log_evidence) == pytest.approx(exact()[1], rel=0.05)
    assert samples.weights.sum() == pytest.approx(1) and 100 < samples.ess < 1500
    assert samples.mean(lambda t: t["first"] == "a") == pytest.approx(
        sum(p for value, p in exact()[0].items() if value[0] == "a"), abs=0.04
    )


def test_a_tempered_proposal_is_weighed_back(lm: LM) -> None:
    samples = likelihood_weighting(toy(lm, 2.0), 1500, seed=2)
    assert far(samples.posterior()) < 0.04
    unweighed = forward(toy(lm, 2.0), 300, seed=2)
    assert any(t.sites["first"].score != pytest.approx(t.sites["first"].proposal) for t in unweighed)


def test_rejection_is_enumeration_both_ways(lm: LM) -> None:
    by_likelihood = rejection(toy(lm), 500, seed=3)
    by_match = rejection(toy(lm), 500, seed=4, match=operator.eq)
    for samples in (by_likelihood, by_match):
        assert len(samples) == 500 and samples.ess == pytest.approx(500)
        assert far(samples.posterior()) < 0.07
        assert samples.attempts > 500
    looser = rejection(toy(lm), 200, seed=4, match=lambda drawn, seen: True)
    assert looser.attempts == 200


def test_sequential_is_enumeration_with_and_without_resampling(lm: LM) -> None:
    for resample, within in ((0.0, 0.04), (1.0, 0.05)):
        samples = sequential(toy(lm), 1200, seed=5, resample=resample)
        assert far(samples.posterior()) < within
        assert math.exp(samples.log_evidence) == pytest.approx(exact()[1], rel=0.06)
    plain = likelihood_weighting(toy(lm), 50, seed=5)
    assert sequential(toy(lm), 50, seed=5, resample=0).log_weights == pytest.approx(plain.log_weights)


def test_resampled_particles_share_what_came_before_and_differ_after(lm: LM) -> None:
    @program
    def funnel() -> Steps:
        first = yield sample(lm("<", max_tokens=6), "first")
        yield factor(0.0 if first.startswith("c") else -50.0, "keep")
        return (yield sample(lm("<", max_tokens=8), "second"))

    samples = sequential(funnel(), 40, seed=0)
    parents = {t["first"] for t in samples}
    assert all(first.startswith("c") for first in parents) and len(parents) < 40
    sharing = [t for t in samples if t["first"] == samples[0]["first"]]
    assert len({t["second"] for t in sharing}) > 1
    assert len({t.sites["first"].score for t in sharing}) == 1
    assert math.exp(samples.log_evidence) == pytest.approx(0.2, abs=0.13)


def test_beam_finds_the_likeliest_and_its_clones_share_their_prefix(lm: LM) -> None:
    @program
    def path() -> Steps:
        text = "<"
        for i in range(4):
            text += yield sample(lm(text, max_tokens=1), f"step{i}")
        return text[1:]

    samples = beam(path(), width=8, expand=8, seed=1)
    scores = {}
    for letters in itertools.product(LETTERS, repeat=4):
        steps = itertools.pairwise("<" + "".join(letters))
        scores["".join(letters)] = sum(math.log(AFTER[a][LETTERS.index(b)]) for a, b in steps)
    best = max(scores, key=lambda text: scores[text])
    assert samples[0].value == best and samples[0].score == pytest.approx(scores[best])
    assert len(samples) == 8 == len({t.value for t in samples})
    assert list(samples.log_weights) == sorted(samples.log_weights, reverse=True)
    shared = [t for t in samples if t["step0"] == samples[0]["step0"]]
    assert len(shared) > 1 and len({t.sites["step0"] for t in shared}) == 1
    assert len({t.value for t in shared}) == len(shared)


def test_beam_counts_what_was_observed_after_a_draw(lm: LM) -> None:
    @program
    def steered() -> Steps:
        first = yield sample(lm("<", max_tokens=1), "first")
        yield factor(-9.0 if first == "a" else 0.0, "avoid")
        return first + (yield sample(lm(first, max_tokens=1), "second"))

    assert beam(steered(), width=1, expand=12, seed=0)[0].value[0] != "a"


def test_calls_of_many_traces_are_asked_together(lm: LM) -> None:
    table = lm.model
    assert isinstance(table, Table)
    together = likelihood_weighting(toy(lm), 50, seed=1)
    assert table.batches == [50, 50, 50, 50]  # two draws, each then scored
    alone = likelihood_weighting(toy(lm), 50, seed=1, together=False)
    assert max(table.batches[4:]) == 1
    assert [t.records for t in alone] == [t.records for t in together]


def test_replay_asks_no_model(lm: LM) -> None:
    trace = handlers.trace(toy(lm), 3)
    table = lm.model
    assert isinstance(table, Table)
    asked = len(table.batches)
    again = handlers.trace(handlers.replay(toy(lm), trace), 99)
    assert again.records == trace.records and again.score == trace.score and len(table.batches) == asked


def test_votes_and_tables(lm: LM) -> None:
    samples = forward(toy(lm), 100, seed=0)
    value, share = samples.mode("second")
    whole = [t for t in samples if t.rejected is None]  # an answer that cannot be rejects
    assert 50 < len(whole) < 100
    assert share == pytest.approx(sum(t["second"] == value for t in whole) / len(whole))
    assert samples.cost() == {"tokens": sum(t.tokens for t in samples), "forwards": sum(t.forwards for t in samples)}
    row = samples.table("first", None)[0]
    assert row["first"] == samples[0]["first"] and row["weight"] in (0, pytest.approx(1 / len(whole)))
    assert samples.best() is whole[0]


def test_what_inference_cannot_do_is_told(lm: LM) -> None:
    @program
    def never() -> Steps:
        yield reject("not today")

    @program
    def gains() -> Steps:
        yield factor(1.0)

    @program
    def endless() -> Steps:
        i = 0
        while True:
            i += 1
            yield sample(Bernoulli(0.5), f"x{i}")
            yield factor(-0.1, f"f{i}")

    with pytest.raises(EffcError, match="rejection: none of 40 runs accepted"):
        rejection(never(), 2)
    with pytest.raises(EffcError, match=r"each of 3 traces has weight 0 \(not today\)"):
        _ = likelihood_weighting(never(), 3).weights
    with pytest.raises(EffcError, match="rejection: a log weight of 1, want at most log_bound=0; raise it"):
        rejection(gains(), 2)
    assert len(rejection(gains(), 2, log_bound=1.0)) == 2
    with pytest.raises(EffcError, match="sequential: not done after 5 rounds"):
        sequential(endless(), 3, max_rounds=5)
    with pytest.raises(EffcError, match="beam: not done after 5 rounds"):
        beam(endless(), 2, 2, max_rounds=5)
    with pytest.raises(EffcError, match="beam: width=0"):
        beam(endless(), 0)
    with pytest.raises(EffcError, match="sequential: n=0"):
        sequential(endless(), 0)
