"""Models written here, lowered: what is raised and rolled, that logits and decoding hold, what is refused."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

import effc
from effc.errors import EffcError
from effc.frontend import Lowered, lower
from effc.frontend.check import check
from effc.frontend.source import Source
from effc.frontend.trace import formula
from effc.ir import dump, parse, verify
from effc.ir.core import walk
from tests.frontend import zoo

RAISED = ["unrolled", "scanned", "alternating", "alibi", "nnx"]


@cache
def lowered(name: str) -> tuple[Source, Lowered]:
    model, params = zoo.MODELS[name]()
    source = effc.load(model, params, name=name, context=40)
    return source, lower(source)


def kinds(low: Lowered) -> list[str]:
    return [op.kind for func in low.module.funcs.values() for op in walk(func)]


@pytest.mark.parametrize("name", [*RAISED, "sink"])
def test_logits_and_decoding_are_the_models(name: str) -> None:
    source, low = lowered(name)
    lines = check(low, source)
    assert len(lines) == 2
    assert lines[-1].startswith("decoding")


@pytest.mark.parametrize("name", [*RAISED, "sink"])
def test_everything_is_raised_and_rolled(name: str) -> None:
    _, low = lowered(name)
    assert low.notes == []
    found = kinds(low)
    assert "repeat" in found and "attention" in found
    assert not {"lax.dot_general", "lax.rsqrt", "lax.gather", "lax.exp", "lax.cos", "window"} & set(found)


@pytest.mark.parametrize("name", [*RAISED, "sink"])
def test_text_round_trips_and_verifies(name: str) -> None:
    _, low = lowered(name)
    assert parse(dump(low.module)) == low.module
    assert verify(low.module) == []


@pytest.mark.parametrize("name", RAISED)
def test_dump(name: str, golden) -> None:
    golden(dump(lowered(name)[1].module))


def test_scanned_and_unrolled_layers_give_one_program() -> None:
    _, one = lowered("unrolled")
    _, other = lowered("scanned")
    assert one.module.funcs["layer"].ops == other.module.funcs["layer"].ops
    assert [p.type for p in one.module.params.values()] == [p.type for p in other.module.params.values()]


def test_alternating_layers_repeat_in_pairs() -> None:
    _, low = lowered("alternating")
    (repeat,) = [op for op in low.module.funcs["forward"].ops if op.kind == "repeat"]
    assert repeat.attrs["times"] == 2
    windows = [op.attrs.get("window", 0) for op in low.module.funcs["layer"].ops if op.kind == "attention"]
    assert windows == [6, 0]
    assert {p.over for p in low.module.params.values() if p.stack} == {(0, 4, 2), (1, 5, 2)}


def test_what_cannot_be_raised_says_so() -> None:
    _, low = lowered("late")
    assert "window" in kinds(low)
    assert "recompute the whole window" in low.notes[0]
    assert re.search(r"zoo\.py:\d+", low.notes[0])


def test_positions_limit_the_context() -> None:
    model, params = zoo.MODELS["nnx"]()
    assert lower(effc.load(model, params, context=4000)).module.meta["context"] == 40


def test_long_contexts_do_not_drown_linear_biases() -> None:
    model, params = zoo.MODELS["alibi"]()
    low = lower(effc.load(model, params))  # no context named: the default is long
    assert low.notes == []
    assert "attention" in kinds(low)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    source = effc.load(*zoo.initialised(zoo.Encoder()), name="encoder", context=40)
    with pytest.raises(EffcError, match="not causal"):
        check(lower(source), source)


def test_logits_of_one_position_are_refused() -> None:
    with pytest.raises(EffcError, match=r"want .*batch, length, vocabulary"):
        lower(effc.load(lambda p, x: p["w"][x][:, -1], {"w": np.ones((5, 7), np.float32)}))


@pytest.mark.parametrize(
    ("p", "q", "text"), [(12, 16, "t"), (2, 3, "b"), (24, 48, "b*t"), (13, 17, "t+1"), (48, 64, "4*t"), (7, 7, "7")]
)
def test_sizes_are_formulas(p: int, q: int, text: str) -> None:
    assert str(formula(p, q, ((2, 12), (3, 16)))) == text
