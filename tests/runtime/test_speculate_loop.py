"""The speculative loop: same tokens as plain decoding, caches as after a prefill, whatever the drafts are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.runtime.engine import DONE, Engine, How
from effc.runtime.generate import generate
from effc.runtime.lookup import search
from effc.runtime.program import Program
from effc.runtime.sampling import Sampling

LOOKUP = {"strategy": "speculative", "kind": "lookup", "gamma": 5, "forward": "forward"}
EAGER = {**LOOKUP, "acceptance": (0.9,) * 9, "verify": (1.0,) * 6}
"""Drafts whenever anything matches."""

PROMPTS = [[5, 9, 2, 33, 8, 1, 60, 5, 9], [7], [1, 2, 3, 4, 1, 2, 3], [3, 3, 3]]
ALL = Sampling(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


def with_drafter(program: Program, params: Any, decode: dict[str, Any], eos: tuple[int, ...] = ()) -> Engine:
    return Engine(replace(program, decode=decode), params, eos)


@pytest.fixture(scope="module")
def eager(program: Program, params: Any) -> Engine:
    return with_drafter(program, params, EAGER)


@pytest.mark.parametrize("sampling", [Sampling(), ALL], ids=["greedy", "sampled"])
def test_tokens_are_those_of_plain_decoding(engine: Engine, eager: Engine, sampling: Sampling) -> None:
    plain = generate(engine, PROMPTS, max_new_tokens=40, sampling=sampling, seed=3)
    drafted = generate(eager, PROMPTS, max_new_tokens=40, sampling=sampling, seed=3, chunk=7)
    assert drafted.tokens == plain.tokens and drafted.finish == plain.finish
    stats = drafted.stats.draft
    assert stats and stats.emitted == sum(map(len, plain.tokens)) - 4 == stats.calls + stats.accepted
    assert 0 < stats.accepted < stats.drafted


def test_a_row_does_not_depend_on_the_others(eager: Engine) -> None:
    batch = generate(eager, PROMPTS, max_new_tokens=20)
    for row, prompt in enumerate(PROMPTS):
        assert generate(eager, [prompt], max_new_tokens=20).tokens == [batch.tokens[row]]


def test_stops_inside_a_draft(engine: Engine, eager: Engine) -> None:
    free = generate(engine, PROMPTS[:1], max_new_tokens=40).tokens[0]
    for stop in set(free[1:]):
        want = generate(engine, PROMPTS, max_new_tokens=40, stop_ids=[stop])
        got = generate(eager, PROMPTS, max_new_tokens=40, stop_ids=[stop])
        assert got.tokens == want.tokens and got.finish == want.finish


def test_the_last_position_of_the_context_is_used(engine: Engine, eager: Engine) -> None:
    prompt = [1 + i % 6 for i in range(160)]
    want = generate(engine, [prompt, [4]], max_new_tokens=40).tokens
    assert generate(eager, [prompt, [4]], max_new_tokens=40).tokens == want
