"""The cost-quality curve of a cascade: which ways are on it, what each came to, how it is shown."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from effc import curves
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.passes import Cascade, SpecCascade
from effc.passes.base import PassError
from effc.passes.cascade import ways
from effc.passes.cascade.texts import Prompts
from effc.passes.cascade.ways import ANSWER, TOKEN, Way, Ways, drawn, judge, running, tokens_of
from effc.passes.runner import step
from effc.runtime.deferral import RULES
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.program import Program
from tests.runtime.conftest import TINY
from tests.runtime.test_speculate import DECODE, DRAFT, TARGET, V, toy

ROWS = [[i % V, (i // V) % V] for i in range(40)]
ASKED = SpecCascade(rule="diff", kind="int4", tokens=9, loss="agreement", prompt=8, curve=4)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(ROWS, None, ASKED)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(Program(toy(TARGET), {}, None, {"draft": toy(DRAFT)}, DECODE), {})


def test_a_curve_has_every_rule_beside_plain_speculation_and_each_model_alone(
    engine: Engine, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "RULES", ("diff",))
    monkeypatch.setattr(ways, "EACH", 2)
    monkeypatch.setattr(ways, "ROUNDS", 1)
    module = step(ASKED, parse(TINY.read_text())).after
    assert module.decode is not None
    told = {**DECODE, "drafter": "draft", "rule": "diff", "alpha": 0.1}
    module = replace(module, decode=replace(module.decode, attrs=told))  # type: ignore[arg-type]
    found = drawn(ASKED, module, engine, prompts, ("diff", 0.1))
    rows: list[dict[str, Any]] = found["rows"]
    assert found["prompts"] == 4
    assert list(dict.fromkeys(row["way"] for row in rows)) == [
        "large", "small", "speculation", "diff", TOKEN, ANSWER,
    ]  # fmt: skip
    at = {(row["way"], row["setting"]): row for row in rows}
    assert [name for name, row in at.items() if row["mark"]] == [("diff", 0.1)]
    assert at["diff", 0.1]["mark"] == "certified" and all(row["rate"] > 0 and row["speed"] > 0 for row in rows)
    # Nothing is lost where the text is the large model's own, and all that the small one loses at the bold end.
    lost = at["small", None]["loss"]
    assert at["large", None]["loss"] == at["speculation", None]["loss"] == at["diff", -0.8]["loss"] == 0 < lost
    assert at["diff", 1.0]["deferral"] == 0 and 0 < at["diff", 1.0]["loss"] <= 1
    bold = min((row for row in rows if row["way"] == ANSWER), key=lambda row: row["deferral"])
    assert bold["deferral"] == 0 and (bold["large_calls"], bold["small_calls"]) == (0, 36)  # answers are read once more
    assert at["large", None]["large_calls"] == 32 and at["small", None]["small_calls"] == 32
    assert at["speculation", None]["large_calls"] < 32 and "deferral" not in at["speculation", None]


def test_the_curve_is_of_all_rules() -> None:
    assert set(ways.RULES) == set(RULES)


def test_what_is_judged_is_what_generate_says(engine: Engine, prompts: Prompts) -> None:
    base = Ways(engine)
    few, (large, small, _) = prompts.first(4), base.plain()
    full = tokens_of(few.generate(large.engine))
    assert full == [generate(large.engine, [row], max_new_tokens=9).tokens[0] for row in ROWS[:4]]
    alone = tokens_of(few.generate(small.engine))
    judge(small, few, full, references=full)
    wrong = [a != b for one, other in zip(alone, full, strict=True) for a, b in zip(one, other, strict=True)]
    assert small.loss == pytest.approx(sum(wrong) / len(wrong)) and small.score == pytest.approx(1 - small.loss)
    way = Way("diff", 0.4, base.deferring("diff"), {"alpha": 0.4})
    judge(way, few, full)
    assert way.told["deferral"] == pytest.approx(
        sum(g.stats.draft.deferral * g.stats.draft.emitted for g in few.generate(way.engine, alpha=0.4))  # type: ignore[union-attr]
        / way.told["emitted"]
    )


def test_a_head_or_a_cut_vocabulary_cannot_speak_alone(engine: Engine) -> None:
    assert [way.name for way in Ways(engine, whole=False).plain()] == ["large", "speculation"]


@pytest.mark.parametrize(
    ("made_by", "want"),
    [
        (SpecCascade(kind="int4", rule="opt", alpha="0.25"), ("opt", 0.25)),
        (Cascade(kind="int4", level="token", threshold="0.9"), (TOKEN, 0.1)),
        (Cascade(kind="int4", threshold="0.7"), (ANSWER, 0.7)),
    ],
)
def test_what_runs_is_on_the_curve(made_by: SpecCascade | Cascade, want: tuple[str, float]) -> None:
    large: Module = parse(TINY.read_text())
    assert running(step(replace(made_by, prompt=8, tokens=8), large).after) == want


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(PassError, match="curve=-1, want 0 or more prompts"):
        SpecCascade(kind="int4", curve=-1).requires(parse(TINY.read_text()))


SHOWN: list[dict[str, Any]] = [
    {"way": "large", "setting": None, "mark": "", "loss": 0.0, "rate": 50.0, "speed": 0.5},
    {"way": "small", "setting": None, "mark": "", "loss": 0.4, "rate": 200.0, "speed": 2.0},
    {"way": "speculation", "setting": None, "mark": "", "loss": 0.0, "rate": 100.0, "speed": 1.0},
    {"way": "opt", "setting": 0.1, "mark": "certified", "loss": 0.02, "deferral": 0.3, "acceptance": 0.9,
     "large_calls": 20, "small_calls": 60, "rate": 110.0, "speed": 1.1},
    {"way": "opt", "setting": 1.0, "mark": "", "loss": 0.3, "rate": 150.0, "speed": 1.5},
    {"way": TOKEN, "setting": 0.2, "mark": "certified", "loss": 0.04, "rate": 180.0, "speed": 1.8},
]  # fmt: skip


def test_the_verdict_is_of_certified_rules_alone() -> None:
    assert curves.verdict(SHOWN, 0.05) == "at a certified loss of 0.05 opt, alpha 0.1, is x1.100 of plain speculation"
    slower = [{**row, "speed": 0.9} if row["way"] == "opt" and row["mark"] else row for row in SHOWN]
    assert curves.verdict(slower, 0.05) == "at a certified loss of 0.05 no rule is faster than plain speculation"


def test_the_plot_has_every_setting_where_it_belongs() -> None:
    picture, letters = curves.svg(SHOWN), curves.chart(SHOWN)
    assert picture.count("<circle") == len(SHOWN) and picture.count('r="6"') == 2
    assert 'cx="335.0" cy="37.0"' in picture  # x1.1 of x2.0, a loss of 0.02 of 0.4
    assert "opt 0.1: loss 0.0200, 30.0% deferred, 90.0% of drafts accepted, 20 forwards of the large model" in picture
    first, last = letters.splitlines()[0], letters.splitlines()[20]
    assert first.index("a") < first.index("c") and last.endswith("b")
    assert all(
        re.search(rf"\b{key} {name}", letters) for key, name in zip("abcde", dict.fromkeys(r["way"] for r in SHOWN))
    )
    lines = curves.summary({"prompts": 8, "rows": SHOWN})
    assert lines[0].startswith("certified, on 8 prompts: opt 0.1: loss 0.0200, 30.0% deferred")
    assert "curve of opt (0.1; 1): 0.020 at x1.10; 0.300 at x1.50" in lines and curves.summary({}) == []
