"""Cascades as passes: what they attach, what they refuse, which passes they go with, what is measured of texts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.calibration.learn_then_test import certify
from effc.errors import EffcError
from effc.ir.core import Decode, Module
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.verify import verify
from effc.passes import PASSES, Cascade, Exactness, SpecCascade
from effc.passes.base import PassError
from effc.passes.cascade.calibrate import without
from effc.passes.cascade.small import Cascading, check_apart, part
from effc.passes.cascade.texts import Prompts, Speaking
from effc.passes.cascade.whole import GRID, Answered
from effc.passes.runner import step
from effc.pipeline import CONFLICTS, Pipeline
from effc.runtime.deferral import GRIDS
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.program import Program
from tests.runtime.conftest import TINY
from tests.runtime.test_speculate import DECODE, DRAFT, TARGET, V, toy


@pytest.fixture(scope="module")
def large() -> Module:
    return parse(TINY.read_text())


@pytest.mark.parametrize(
    ("made_by", "strategy", "shown"),
    [
        (SpecCascade(alpha="0.5", layers=1), "speculative", "gamma=8, vocab=@draft.ids, rule=tokenv3, alpha=0.5 }"),
        (SpecCascade(kind="int4", rule="opt", gamma=2), "speculative", "gamma=2, rule=opt, alpha=-1e+30 }"),
        (SpecCascade(kind="head", rule="chow", alpha="0.1", vocab=0), "speculative", "rule=chow, alpha=0.1 }"),
        (Cascade(kind="int4", threshold="0.4"), "cascade", "level=sequence, confidence=mean, threshold=0.4 }"),
        (Cascade(kind="int4", confidence="min"), "cascade", "level=sequence, confidence=min, threshold=1.0 }"),
        (Cascade(kind="int4", level="token", threshold="0.9"), "cascade", "level=token, rule=chow, alpha=0.1 }"),
        (Cascade(layers=1, level="token"), "cascade", "shared=true, gamma=16, level=token, rule=chow, alpha=-1e+30 }"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_attached_is_legal_and_says_what_it_does(
    large: Module, made_by: Cascading, strategy: str, shown: str
) -> None:
    made_by = replace(made_by, vocab=16) if isinstance(made_by, SpecCascade) and made_by.vocab else made_by
    after = step(replace(made_by, prompt=8, tokens=8), large).after
    assert verify(after) == [] and parse(dump(after)) == after and shown in dump(after)
    assert load_program(emit(after)).decode["strategy"] == strategy and "draft" in load_program(emit(after)).entries
    assert after.forward() == large.forward()


@pytest.mark.parametrize("made_by", [SpecCascade(kind="int4", rule="diff"), Cascade(kind="int4", level="token")])
def test_without_its_rule_it_is_plain_speculation(large: Module, made_by: Cascading) -> None:
    plain = without(step(replace(made_by, prompt=8, tokens=8), large).after)
    assert verify(plain) == []
    assert "decode speculative { forward=@forward, kind=model, drafter=@draft, gamma=8 }" in dump(plain)


@pytest.mark.parametrize(
    ("made_by", "decode", "message"),
    [
        (SpecCascade(alpha="much"), None, "speccascade: alpha=much, want a finite number, or auto"),
        (SpecCascade(alpha="inf"), None, "alpha=inf, want a finite number"),
        (SpecCascade(kind="model"), None, "speccascade: kind=model and model=PATH go together"),
        (SpecCascade(layers=2, kind="int4"), None, "layers=2 are those of kind=self, want none for kind=int4"),
        (SpecCascade(delta=0.0), None, "delta and epsilon, want more than 0"),
        (SpecCascade(tokens=1), None, "tokens 2 or more"),
        (SpecCascade(prompt=60, tokens=60), None, "120 together, want at most the context of 96"),
        (SpecCascade(), Decode("speculative", {}), "speccascade: decode is speculative already, want greedy"),
        (Cascade(kind="head"), None, "cascade: kind=head reads what the large model makes"),
        (Cascade(threshold="1.5"), None, "cascade: threshold=1.5, want 0 (the small model always)"),
        (Cascade(lessons="lines.txt", kind="int4"), None, "prompts are what kind=self and kind=head learn from"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(
    large: Module, made_by: Cascading, decode: Decode | None, message: str
) -> None:
    module = replace(large, decode=decode) if decode else large
    with pytest.raises(PassError) as caught:
        made_by.requires(replace(module, meta={**module.meta, "context": 96}))
    assert message in str(caught.value)


def test_what_copies_is_no_small_model() -> None:
    with pytest.raises(EffcError, match="kind=lookup, want auto or model or int4 or self or head"):
        Pipeline.parse("speccascade{kind=lookup}")


MENDS = {
    (
        "speccascade",
        "draft",
    ): "speccascade{kind=head} or {model=PATH} for what draft{kind=...} would attach; lookup has",
    ("cascade", "draft"): "cascade{model=PATH} for its own text, draft{kind=model} for the large model's",
    ("speccascade", "calm"): "keep one: calm leaves layers out",
    ("cascade", "calm"): "keep one: calm leaves layers out",
    ("speccascade", "cascade"): "keep one: speccascade asks the large one of every token",
    ("speccascade", "mor{router=expert}"): "write mor{router=none}",
    ("cascade", "mor{router=token}"): "write mor{router=none}",
}


@pytest.mark.parametrize("pair", MENDS, ids=str)
def test_illegal_pairs_name_both_and_the_mend(pair: tuple[str, str]) -> None:
    for written in (pair, pair[::-1]):
        with pytest.raises(EffcError) as caught:
            Pipeline.parse(",".join(written))
        assert all(f"'{name}'" in str(caught.value) for name in pair) and MENDS[pair] in str(caught.value)


def test_it_goes_with_every_other_pass() -> None:
    for name in {"speccascade", "cascade"}:
        against = {other for pair in CONFLICTS if name in pair for other in pair - {name}}
        assert against == {"calm", "draft", "cascade", "speccascade"} - {name}
        for other in PASSES.keys() - against - {name}:
            assert len(Pipeline.parse(f"{name},{other}").ordered()) == 2


def test_how_exact_it_is_depends_on_who_chose() -> None:
    assert Pipeline.parse("speccascade").exactness() is Exactness.GUARANTEED
    assert Pipeline.parse("cascade{model=x}").exactness() is Exactness.GUARANTEED
    assert Pipeline.parse("speccascade{alpha=0.2}").exactness() is Exactness.LOSSY
    assert Pipeline.parse("cascade{threshold=0.2}").exactness() is Exactness.LOSSY
    assert Pipeline.parse("speccascade,quant8").exactness() is Exactness.LOSSY


def test_prompts_are_apart_from_what_the_small_model_learnt(tmp_path: Path) -> None:
    text = "abcdefgh"
    (tmp_path / "model.effc").write_text("")
    learnt = {"format": 1, "trained_on": {"a.txt": hashlib.sha256(text.encode()).hexdigest()}}
    (tmp_path / "manifest.json").write_text(json.dumps(learnt))
    check_apart("speccascade", tmp_path, SimpleNamespace(calib="other"))  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"was trained on this --calib.*want other text"):
        check_apart("speccascade", tmp_path, SimpleNamespace(calib=text))  # type: ignore[arg-type]
    trains: Any = SimpleNamespace(calib=text)
    assert part(SpecCascade(), trains, learnt=True) == "abcd" and part(SpecCascade(), trains, learnt=False) == "efgh"
    whole = SpecCascade(kind="int4")
    assert part(whole, trains, learnt=False) == text


# ---- what is measured


ROWS = [[i % V, (i // V) % V] for i in range(40)]


@pytest.fixture(scope="module")
def speaking() -> Speaking:
    told = {**DECODE, "rule": "diff", "alpha": 0.5}
    engine = Engine(Program(toy(TARGET), {}, None, {"draft": toy(DRAFT)}, told), {})
    return Speaking(engine, Prompts(ROWS, None, SpecCascade(tokens=9, loss="agreement")))


def test_texts_at_every_alpha_come_of_one_loop_and_are_held_against_the_large_models(speaking: Speaking) -> None:
    alone = [generate(Engine(Program(toy(t), {}), {}), ROWS, max_new_tokens=9).tokens for t in (TARGET, DRAFT)]
    assert speaking.full == alone[0]
    small = speaking.say(1.0)  # but the first token, which comes with the prompt
    assert [row[0] for row in small] == [row[0] for row in alone[0]] and small != alone[0]
    assert speaking.told[1.0]["deferral"] == 0 and speaking.told[-float("inf")]["deferral"] == 1
    assert speaking.told[1.0]["large_calls"] < speaking.told[1.0]["emitted"]
    lost = {alpha: float(np.mean(speaking.losses(alpha))) for alpha in (-1.0, 0.0, 1.0)}
    assert lost[-1.0] == 0 < lost[1.0] <= 1
    assert lost[1.0] == pytest.approx(np.mean([np.mean(np.asarray(a) != b) for a, b in zip(small, alone[0])]))
    compiled = len(speaking.engine._compiled)
    speaking.say(0.3)
    assert len(speaking.engine._compiled) == compiled


def test_the_grid_is_tried_from_the_safest_on_until_the_first_that_fails(speaking: Speaking) -> None:
    found = certify(speaking.losses, len(ROWS), delta=0.2, epsilon=0.05, grid=GRIDS["diff"])
    assert [t.setting for t in found.tried] == list(GRIDS["diff"][: len(found.tried)])
    assert [t.passed for t in found.tried] == [True] * (len(found.tried) - 1) + [False]
    assert found.chosen is not None and found.chosen < 1 and found.loss < 0.2


def test_an_answer_loses_only_where_the_small_model_is_believed() -> None:
    answered = Answered([0.9, 0.5, 0.2], [0.1, 0.3, 1.0])
    assert answered.losses(0.5) == [0.1, 0.3, 0.0] and answered.deferral(0.5) == pytest.approx(1 / 3)
    assert answered.losses(0.95) == [0.0] * 3 and answered.deferral(0.0) == 0
    assert list(GRID) == sorted(GRID, reverse=True) and GRID[0] == 0.99 and GRID[-1] == 0


def test_an_alpha_without_a_rule_is_refused() -> None:
    with pytest.raises(EffcError, match=r"alpha is 0\.5, but no deferral rule runs here"):
        generate(Engine(Program(toy(TARGET), {}), {}), [[1]], max_new_tokens=2, alpha=0.5)
