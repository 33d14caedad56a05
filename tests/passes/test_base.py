"""What every pass owes: a spelling that reads back, documented options, kept claims."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from effc.errors import EffcError
from effc.ir.core import Func, Module, Op
from effc.ir.printer import dump
from effc.passes import PASSES, Exactness, Notes, Pass, PassError, Phase, Quant4, runner
from effc.pipeline import Pipeline


@pytest.mark.parametrize("cls", PASSES.values(), ids=PASSES)
def test_every_option_is_spelled_back_and_has_a_meaning(cls: type[Pass]) -> None:
    assert str(cls()) == cls.name
    for one in cls.options():
        assert one.doc, f"{cls.name}: option {one.name} has no doc"
        other = {"true": "false"}.get(str(one.default).lower(), "true") if one.kind == "bool" else None
        text = other or next((c for c in one.kind.split("|") if c != str(one.default)), "7")
        number = "64.0" if one.kind == "float" else "64"
        spelled = f"{cls.name}{{{one.name}={text if '|' in one.kind or other else number}}}"
        assert str(Pipeline.parse(spelled)) == spelled


ONCE = {"mor", "calm", "draft", "speccascade", "cascade"}
"""What they make they do not take."""

TWO_LAYERS = {"mor": {"share": "cycle"}}
"""Options without which a pass has nothing to do in a module of two layers."""


def made(cls: type[Pass]) -> Pass:
    return cls.build(TWO_LAYERS.get(cls.name, {}))


@pytest.mark.parametrize("cls", PASSES.values(), ids=PASSES)
def test_running_twice_changes_nothing_more(cls: type[Pass], tiny: Module) -> None:
    once = runner.step(made(cls), tiny).after
    if cls.name in ONCE:
        with pytest.raises(PassError, match=f"^{cls.name}: "):
            runner.step(made(cls), once)
        return
    assert runner.step(made(cls), once).after == once


@pytest.mark.parametrize("cls", PASSES.values(), ids=PASSES)
def test_golden(cls: type[Pass], tiny: Module, golden) -> None:
    step = runner.step(made(cls), tiny)
    said = [f"# {line}" for line in step.notes.choices]
    said += [f"# {what} left alone: {why}" for what, why in step.notes.skips]
    golden("\n".join([*said, dump(step.after)]))


def test_docs_are_one_sentence() -> None:
    assert all(cls.doc().endswith(".") and len(cls.doc()) < 140 for cls in PASSES.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grup": "3"}, "quant4: no option 'grup', want one of group, sym, .*; did you mean 'group'?"),
        ({"group": "x"}, "quant4: group=x is not an int"),
        ({"sym": "maybe"}, "quant4: sym=maybe, want true or false"),
        ({"scale": "f61"}, "quant4: scale=f61, want f16 or bf16 or f32; did you mean 'f16'?"),
    ],
)
def test_bad_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(EffcError, match=message.replace("?", r"\?")):
        Quant4.build(options)


@dataclass(frozen=True)
class _Rogue(Pass):
    """Drops every silu, and says it touches nothing."""

    name: ClassVar[str] = "rogue"
    phase: ClassVar[Phase] = Phase.CLEAN
    exactness: ClassVar[Exactness] = Exactness.EXACT
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, module: Module, notes: Notes) -> Module:
        return replace(module, funcs={n: _swapped(f) for n, f in module.funcs.items()})


def _swapped(func: Func) -> Func:
    return replace(func, ops=tuple(replace(o, kind="gelu") if o.kind == "silu" else o for o in func.ops))


def test_ops_outside_writes_are_refused(tiny: Module) -> None:
    with pytest.raises(PassError, match="rogue: changed gelu, silu, want no op at most"):
        runner.step(_Rogue(), tiny)


@dataclass(frozen=True)
class _Breaks(Pass):
    """Leaves a module that reads a value nobody makes."""

    name: ClassVar[str] = "breaks"
    phase: ClassVar[Phase] = Phase.CLEAN
    exactness: ClassVar[Exactness] = Exactness.EXACT
    writes: ClassVar[frozenset[str]] = frozenset({"*"})

    def run(self, module: Module, notes: Notes) -> Module:
        func = module.forward()
        lost = Op("silu", ("nowhere",), func.ops[0].outputs)
        return module.with_func(replace(func, ops=(lost, *func.ops[1:])))


def test_an_illegal_module_names_the_pass(tiny: Module) -> None:
    with pytest.raises(PassError, match=r"breaks: left an illegal module\n(.|\n)*nowhere"):
        runner.step(_Breaks(), tiny)


def test_dumps_are_numbered_and_read_back(tiny: Module, tmp_path, apply) -> None:
    seen: list[str] = []
    watch = runner.both(runner.dumper(tmp_path / "d"), runner.printer(seen.append))
    runner.run(tiny, Pipeline.parse("clean,quant4").ordered(), watch)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "00-input.effc",
        "01-clean.effc",
        "02-quant4.effc",
    ]
    assert (tmp_path / "d" / "00-input.effc").read_text() == dump(tiny)
    assert seen[2].startswith("# after quant4\neffc 1\n")


def test_a_folder_that_cannot_be_made_is_told(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EffcError, match=r"--dump .*file: .*, want a folder"):
        runner.dumper(tmp_path / "file")
