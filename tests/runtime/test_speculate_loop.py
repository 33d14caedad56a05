"""The speculative loop: same tokens as plain decoding, caches as after a prefill, whatever the drafts are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.passes.base import Notes
from effc.passes.draft import Draft
from effc.runtime.engine import Engine, How
from effc.runtime.generate import Request, Result, Stats, _Run, generate
from effc.runtime.program import Program
from effc.runtime.sampling import Sampling
from tests.runtime.conftest import TINY, random_params

PROMPTS = [[5, 9, 2, 33, 8, 1, 60, 5, 9], [7], [1, 2, 3, 4, 1, 2, 3], [3, 3, 3]]
ALL = Sampling(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
KINDS = ("lookup", "head", "self", "model")
EAGER = {"gamma": 3, "curve": (1.0,) * 4, "cost": 0.0, "acceptance": (0.99,) * 11}
"""Drafts whenever it can."""


def drafted(kind: str) -> Module:
    """The tiny model with a drafter; `model` is a copy of itself, whose arrays are others."""
    module = parse(TINY.read_text())
    if kind == "model":
        from effc.passes.draft_model import _alone, attached

        whole = Draft(kind="lookup", gamma=3).run(module, Notes())
        assert whole.decode is not None
        attrs = {**whole.decode.attrs, "kind": "model", "drafter": parse_ref("draft")}
        return replace(attached(module, _alone(module)), decode=replace(whole.decode, attrs=attrs))
    return Draft(kind=kind, gamma=3, vocab=16, layers=1).run(module, Notes())  # type: ignore[arg-type]


def parse_ref(name: str) -> Any:
    from effc.ir.core import Ref

    return Ref(name)


def engine_with(kind: str, params: Any, **decode: Any) -> Engine:
    program = load_program(emit(drafted(kind)))
    own = {**random_params(program, seed=7), **params}
    if "draft.ids" in own:
        own["draft.ids"] = jnp.asarray(np.random.default_rng(0).permutation(64)[:16], jnp.int32)
    return Engine(replace(program, decode={**program.decode, **EAGER, **decode}), own)


@pytest.fixture(scope="module")
def engines(params: Any) -> dict[str, Engine]:
    return {kind: engine_with(kind, params) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_plain_decoding(engine: Engine, engines: dict[str, Engine], kind: str) -> None:
    plain = generate(engine, PROMPTS, max_new_tokens=40)
    got = generate(engines[kind], PROMPTS, max_new_tokens=40, chunk=7)
    assert got.tokens == plain.tokens and got.finish == plain.finish
    stats = got.stats.draft
    assert stats and stats.emitted == sum(map(len, plain.tokens)) - 4 == stats.calls + stats.accepted
    assert stats.drafted > stats.accepted
