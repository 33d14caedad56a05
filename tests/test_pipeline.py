"""Pipelines as text: spelling, order, what goes together, and every mistake with its mend."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effc.errors import EffcError
from effc.passes import PASSES, Exactness
from effc.pipeline import CONFLICTS, Pipeline


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("quant4", "quant4"),
        (" quant4 { group = 64 , head=4 } , fuse ", "quant4{group=64,head=4},fuse"),
        ("quant4{group=32},clean", "quant4,clean"),
        ("quant4{skip=layers.mlp.*|norm}", "quant4{skip=layers.mlp.*|norm}"),
        ('quant4{skip="a, b"}', 'quant4{skip="a, b"}'),
        ("clean,", "clean"),
        ("fuse{norms=false}", "fuse{norms=false}"),
    ],
)
def test_spelling(text: str, canonical: str) -> None:
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == canonical
    assert Pipeline.parse(canonical) == pipeline


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12))
def test_any_text_survives_as_an_option(text: str) -> None:
    made = PASSES["quant4"].build({"skip": text})
    assert Pipeline.parse(str(made)).passes == (made,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quant5", f"--passes: no pass 'quant5', want some of {', '.join(PASSES)}; did you mean"),
        ("quant4{grup=1}", "quant4: no option 'grup'"),
        ("quant4{group=1,group=2}", "quant4: option 'group' is given twice, want it once"),
        ("clean,fuse,clean", "--passes: 'clean' is there 2 times, want it once"),
        ("quant8,quant4", "--passes: 'quant8' and 'quant4' do not go together: both code the same weights"),
        (
            "quant4{group=64",
            "--passes:1:16: unexpected end, want ',' or '}'\n  quant4{group=64\n                 ^",
        ),
        (
            "quant4 clean",
            "--passes:1:8: unexpected text, want ',' or '{' or the end\n  quant4 clean\n         ^",
        ),
        ("quant4{group=}", "--passes:1:14: unexpected text, want a value"),
        ("quant4{=3}", "--passes:1:8: unexpected text, want "),
        ("4quant", "--passes:1:1: unexpected text, want a name"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(EffcError) as caught:
        Pipeline.parse(text)
    assert str(caught.value).startswith(message)


def test_phases_decide_the_order_and_say_so() -> None:
    pipeline = Pipeline.parse("fuse,quant4,clean")
    assert [p.name for p in pipeline.ordered()] == ["clean", "quant4", "fuse"]
    assert pipeline.order_note() == (
        "passes run by phase, not as written: clean (clean) -> quant4 (quantize) -> fuse (fuse)"
    )
    assert Pipeline.parse("clean,quant4").order_note() == ""


def test_a_pipeline_is_as_exact_as_its_worst_pass() -> None:
    assert Pipeline.parse("").exactness() is Exactness.EXACT
    assert Pipeline.parse("clean,fuse").exactness() is Exactness.EXACT
    assert Pipeline.parse("clean,quant8").exactness() is Exactness.LOSSY


LEGAL = [pair for pair in permutations(PASSES, 2) if frozenset(pair) not in CONFLICTS]


@pytest.mark.parametrize("pair", LEGAL, ids="-".join)
def test_every_legal_pair_runs(pair: tuple[str, str], request: pytest.FixtureRequest) -> None:
    from effc.ir.parser import parse
    from effc.passes import runner

    text = request.path.parent.joinpath("passes", "tiny.effc").read_text()
    text = text.replace("2 * f32", "6 * f32").replace("times=2", "times=6")
    steps = runner.run(parse(text), Pipeline.parse(",".join(pair)).ordered())
    assert len(steps) == 2


@pytest.mark.parametrize("passes", ["mor{router=expert},calm", "draft,mor{router=token}"])
def test_routed_recursions_refuse_what_cannot_follow_them(passes: str) -> None:
    with pytest.raises(EffcError, match=r"'mor\{router=.*\}' and '.*' do not go together: .*write mor\{router=none\}"):
        Pipeline.parse(passes)


def test_the_whole_line_runs_by_phase_and_says_why(request: pytest.FixtureRequest) -> None:
    from effc.ir.parser import parse
    from effc.passes import runner

    text = request.path.parent.joinpath("passes", "tiny.effc").read_text()
    pipeline = Pipeline.parse("quant4,calm,mor")
    steps = runner.run(parse(text.replace("2 * f32", "6 * f32").replace("times=2", "times=6")), pipeline.ordered())
    assert [step.made_by.name for step in steps] == ["mor", "calm", "quant4"]
    assert [line.partition(":")[0] for line in pipeline.phases(heals=True, calibrates=True)] == [
        "fold", "exits", "heal", "quantize", "calibrate",
    ]  # fmt: skip
    early = next(op for op in steps[-1].after.funcs["early"].ops if op.kind == "early")
    assert early.attrs["order"] == (0, 1, 2, 1, 2, 3)
    assert early.attrs["exits"] == (3,)  # where the first recursion ends


def test_conflicts_name_passes_that_exist() -> None:
    assert all(pair <= PASSES.keys() for pair in CONFLICTS)
