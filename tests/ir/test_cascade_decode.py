"""Cascades in `decode`: what is legal reads back from its text, and each mistake is told with what is wanted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from effc.backend.to_python import emit, load_program
from effc.ir.core import Attr, Module, Ref
from effc.ir.decoding import CONFIDENCES, RULES
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.verify import verify
from effc.passes.base import Notes
from effc.passes.draft import Draft
from effc.runtime import answering, deferral
from tests.runtime.conftest import TINY

CERTIFIED = {
    "tokens": 32, "delta": 0.05, "epsilon": 0.05, "loss": 0.01, "n": 200, "measure": "textual", "likeness": "rouge_l",
    "bound": "00ff",
}  # fmt: skip
SEQUENCE = {"level": "sequence", "confidence": "min", "threshold": 0.5}


@pytest.fixture(scope="module")
def drafting() -> Module:
    return Draft(kind="self", layers=1, vocab=0).run(parse(TINY.read_text()), Notes())


def deciding(module: Module, strategy: str, **attrs: Attr | Ref) -> Module:
    assert module.decode is not None
    return replace(module, decode=replace(module.decode, strategy=strategy, attrs={**module.decode.attrs, **attrs}))


@pytest.mark.parametrize(
    ("strategy", "attrs", "shown"),
    [
        ("speculative", {"rule": "tokenv3", "alpha": 0.25}, "rule=tokenv3, alpha=0.25 }"),
        ("speculative", {"rule": "opt", "alpha": -1e30}, "rule=opt, alpha=-1e+30 }"),
        ("speculative", {"rule": "diff", "alpha": 0.1, **CERTIFIED}, 'likeness=rouge_l, bound="00ff" }'),
        ("cascade", SEQUENCE, "level=sequence, confidence=min, threshold=0.5 }"),
        ("cascade", {"level": "sequence"}, "level=sequence }"),
        ("cascade", {"level": "token", "rule": "chow", "alpha": 0.5}, "level=token, rule=chow, alpha=0.5 }"),
    ],
)  # fmt: skip
def test_a_cascade_is_legal_text(drafting: Module, strategy: str, attrs: dict[str, Attr], shown: str) -> None:
    module = deciding(drafting, strategy, **attrs)
    assert verify(module) == [] and parse(dump(module)) == module
    assert f"decode {strategy} {{ forward=@forward" in dump(module) and shown in dump(module)
    decode = load_program(emit(module)).decode
    assert decode["strategy"] == strategy and all(decode[name] == value for name, value in attrs.items())


@pytest.mark.parametrize(
    ("strategy", "attrs", "message"),
    [
        ("speculative", {"rule": "tokenv4", "alpha": 0.5}, "rule=tokenv4, want chow or diff"),
        ("speculative", {"rule": "tokenv3"}, "rule and alpha go together"),
        ("speculative", {"alpha": 0.5}, "rule and alpha go together"),
        ("speculative", {"rule": "opt", "alpha": math.inf}, "alpha=inf, want a finite number (1e30 is as good"),
        ("speculative", {"rule": "opt", "alpha": True}, "alpha=True, want a finite number"),
        ("speculative", {"rule": "opt", "alpha": "most"}, "alpha=most, want a finite number"),
        ("speculative", {"threshold": 0.5}, "no setting 'threshold'"),
        ("cascade", {}, "level=None, want sequence or token"),
        ("cascade", {"level": "token"}, "level=token, rule=None, want chow"),
        ("cascade", {"level": "token", "rule": "diff", "alpha": 0.1}, "level=token, rule=diff, want chow: it alone"),
        ("cascade", {**SEQUENCE, "rule": "chow", "alpha": 0.1}, "level=sequence has a threshold, want no rule"),
        ("cascade", {**SEQUENCE, "confidence": "mode"}, "confidence=mode, want mean or min or quantile"),
        ("cascade", {**SEQUENCE, "threshold": 1.5}, "threshold=1.5, want 0 (always the small model's answer)"),
        ("cascade", {**SEQUENCE, "threshold": math.nan}, "threshold=nan, want 0"),
        ("cascade", {**SEQUENCE, "treshold": 1}, "no setting 'treshold'; did you mean 'threshold'?"),
        ("cascad", SEQUENCE, "no strategy 'cascad', want greedy or speculative or early or cascade; did you mean"),
    ],
)  # fmt: skip
def test_a_wrong_cascade_is_told(drafting: Module, strategy: str, attrs: dict[str, Attr], message: str) -> None:
    faults = [str(fault) for fault in verify(deciding(drafting, strategy, **attrs))]
    assert any(message in fault for fault in faults), faults


def test_what_copies_or_cannot_speak_alone_is_no_cascade() -> None:
    lookup = Draft().run(parse(TINY.read_text()), Notes())
    faults = "\n".join(map(str, verify(deciding(lookup, "speculative", rule="chow", alpha=0.5))))
    assert "kind=lookup has no distribution that a rule could weigh" in faults
    head = Draft(kind="head", vocab=0).run(parse(TINY.read_text()), Notes())
    faults = "\n".join(map(str, verify(deciding(head, "cascade", **SEQUENCE))))
    assert "kind=head, want model or self: the small model answers by itself" in faults


def test_the_ir_and_the_runtime_know_the_same_rules() -> None:
    assert tuple(deferral.RULES) == RULES and tuple(answering.CONFIDENCES) == CONFIDENCES
