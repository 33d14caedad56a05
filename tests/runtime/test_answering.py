"""Whole answers of a small model, kept where they are confident: which model says what, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from effc.errors import EffcError
from effc.runtime.answering import CONFIDENCES, Answers
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.program import Program
from effc.runtime.sampling import Sampling
from tests.runtime.test_speculate import DRAFT, TARGET, V, toy

PROMPTS = [[i % V, (i // V) % V][: 1 + i % 2] for i in range(8)]
TOLD = {"strategy": "cascade", "level": "sequence", "kind": "model", "drafter": "draft", "gamma": 0}


def engine(**decode: Any) -> Engine:
    return Engine(Program(toy(TARGET), {}, None, {"draft": toy(DRAFT)}, {**TOLD, **decode}), {})


@pytest.fixture(scope="module")
def both() -> tuple[Engine, list[list[int]], list[list[int]]]:
    """A cascade, and what each model says alone."""
    found = engine(threshold=0.5)
    alone = [Engine(Program(toy(table), {}), {}) for table in (TARGET, DRAFT)]
    large, small = (generate(one, PROMPTS, max_new_tokens=9).tokens for one in alone)
    assert large != small
    return found, large, small


def logs(prompt: list[int], answer: list[int]) -> np.ndarray:
    whole, table = [*prompt, *answer], np.asarray(jax.nn.log_softmax(DRAFT, axis=-1))
    return np.asarray([table[min(i, 7), whole[i], whole[i + 1]] for i in range(len(prompt) - 1, len(whole) - 1)])


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_each_row_is_the_answer_of_the_model_that_is_sure(both: Any, confidence: str) -> None:
    found, large, small = both
    sure = [CONFIDENCES[confidence](logs(p, answer)) for p, answer in zip(PROMPTS, small)]
    threshold = sorted({round(value, 5) for value in sure})[1] - 1e-4
    found.answers = replace(found.answers, confidence=confidence, threshold=threshold)
    got = generate(found, PROMPTS, max_new_tokens=9)
    late = [value < threshold for value in sure]
    assert got.tokens == [a if d else b for a, b, d in zip(large, small, late)] and 0 < sum(late) < len(late)
    told = got.stats.answers
    assert told and told.deferred == tuple(late) and told.confidences == pytest.approx(sure, abs=1e-5)
    assert (told.large_calls, told.small_calls) == (9 * sum(late), 10 * len(late))
    assert told.deferral == sum(late) / len(late) and f"{sum(late)} of 8 answers deferred" in str(told)
    assert got.stats.new_tokens == 72 and got.stats.decoded == 64 and got.stats.decode_seconds > 0


def test_the_ends_are_the_two_models_and_stops_hold(both: Any) -> None:
    found, large, small = both
    for threshold, want, calls in ((0.0, small, (0, 80)), (1.0, large, (72, 0))):
        found.answers = replace(found.answers, threshold=threshold)
        got = generate(found, PROMPTS, max_new_tokens=9)
        assert got.tokens == want and got.stats.answers
        assert (got.stats.answers.large_calls, got.stats.answers.small_calls) == calls
    stop = small[0][3]
    found.answers = replace(found.answers, threshold=0.0)
    got = generate(found, PROMPTS, max_new_tokens=9, stop_ids=[stop])
    assert got.tokens[0] == small[0][: small[0].index(stop)] and got.finish[0] == "stop"


def test_other_texts_than_those_certified_are_the_large_models() -> None:
    answers = Answers(toy(DRAFT), "mean", 0.3, certified=8)
    assert answers.at(Sampling(), 8) == 0.3
    assert answers.at(Sampling(), 9) == answers.at(Sampling(temperature=1.0), 4) == 1
    assert replace(answers, asked=0.2).at(Sampling(temperature=1.0), 99) == 0.2
    assert replace(answers, certified=0).at(Sampling(temperature=1.0), 99) == 0.3


def test_what_deferred_rows_draw_does_not_depend_on_the_others(both: Any) -> None:
    found, _, _ = both
    found.answers = replace(found.answers, threshold=0.45, confidence="mean")
    how = Sampling(temperature=1.0)
    many = generate(found, PROMPTS[:4], max_new_tokens=9, sampling=how, seed=2)
    alone = generate(found, PROMPTS[:1], max_new_tokens=9, sampling=how, seed=2)
    assert alone.tokens == many.tokens[:1] and many.stats.answers


def test_a_wrong_confidence_is_told() -> None:
    with pytest.raises(EffcError, match=r"no confidence 'meen', want .*did you mean 'mean'"):
        engine(confidence="meen")
