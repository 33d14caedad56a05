"""optimize() on a small Flax model: the artifact, the report, every refusal, and nothing half-written."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from flax import linen as nn

from effc import driver
from effc.artifact import Artifact, verify
from effc.driver import Settings, optimize, plan, transform
from effc.errors import EffcError
from effc.frontend.source import Source
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.passes import PASSES, Exactness, Notes, Pass, PassError, Phase, Quant4

QUIET = Settings(eval_tokens=64, window=32, speed=False)


class Small(nn.Module):
    """Two linears between an embedding and a head: enough to compile."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(96, 64, name="embed")(tokens)
        h = nn.silu(nn.Dense(64, use_bias=False, name="up")(x)) * nn.Dense(64, use_bias=False, name="gate")(x)
        return nn.Dense(96, use_bias=False, name="head")(x + h)


@pytest.fixture(scope="module")
def source(source_of) -> Source:
    return source_of(Small(), 64)


def test_an_artifact_that_is_whole(source: Source, tmp_path: Path) -> None:
    report = optimize(source, tmp_path / "out", replace(QUIET, passes="quant8,fuse", seed=3))
    assert verify(tmp_path / "out") == []
    found = Artifact.load(tmp_path / "out")
    assert report.json() == found.report()
    assert found.manifest["pipeline"] == "quant8,fuse"
    assert found.manifest["seed"] == 3
    assert found.manifest["exactness"] == "lossy"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json", "model.effc", "model.safetensors", "program.py", "report.html", "report.json",
    ]  # fmt: skip
    assert report.after.nbytes < 0.3 * report.before.nbytes
    assert report.after.quality is not None
    assert 0 < report.after.quality.kl < 0.1  # type: ignore[operator]
    assert report.passes[0].gap is not None
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_no_passes_change_nothing(source: Source, tmp_path: Path) -> None:
    report = optimize(source, tmp_path / "out", QUIET)
    assert report.before.nbytes == report.after.nbytes
    assert report.exactness == "exact"
    assert report.after.quality is not None
    assert (report.after.quality.kl, report.after.quality.top1) == (0.0, 1.0)


def test_speed_and_quality_are_measured_in_processes_of_their_own(source: Source, tmp_path: Path) -> None:
    report = optimize(source, tmp_path / "out", replace(QUIET, passes="quant8", speed=True))
    assert report.before.quality is not None
    plain = optimize(source, tmp_path / "again", replace(QUIET, passes="quant8"))
    assert plain.before.quality == report.before.quality
    for side in (report.before, report.after):
        assert side.speed is not None
        assert side.speed.decode > 0
        assert side.speed.prompt + side.speed.generated <= 64


def test_the_same_seed_gives_the_same_bytes(source: Source, tmp_path: Path) -> None:
    for name in ("a", "b"):
        optimize(source, tmp_path / name, replace(QUIET, passes="quant4"))
    for file in ("model.safetensors", "model.effc", "program.py"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_plan_reads_no_weights_and_predicts_the_size(source: Source, tmp_path: Path) -> None:
    class Forbidden:
        names, spec = source.weights.names, source.weights.spec

        def read(self, name: str) -> np.ndarray:
            raise AssertionError(f"{name} was read")

    planned = plan(replace(source, weights=Forbidden()), Settings(passes="quant4"))
    report = optimize(source, tmp_path / "out", replace(QUIET, passes="quant4"))
    assert planned.after.nbytes == report.after.nbytes
    assert planned.json()["passes"][0]["pass"] == "quant4"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size - planned.after.nbytes < 2000


def test_a_hand_edit_takes_effect(source: Source, tmp_path: Path) -> None:
    optimize(source, tmp_path / "a", replace(QUIET, passes="quant4", dump=tmp_path / "dumps"))
    text = (tmp_path / "dumps" / "01-quant4.effc").read_text()
    edited = tmp_path / "edited.effc"
    edited.write_text(text.replace("group=32", "group=16"))
    report = optimize(source, tmp_path / "b", replace(QUIET, ir=edited))
    module = Artifact.load(tmp_path / "b").module
    assert module == parse(edited.read_text())
    assert "group=16" in dump(module)
    assert report.exactness == "lossy"
    assert "the IR is that of edited.effc, edited by hand" in report.notes


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("@up", "@upp", "@upp.* is no parameter of the checkpoint's own IR; did you mean 'up"),
        ("up/kernel", "upp/kernel", "want 0 \\* f32.* of 'up/kernel' as in the checkpoint"),
        ("f32[64,96]", "bf16[64,96]", "is bf16, want f32 as in the checkpoint, or q2 to q8"),
        ("silu", "silo", "silo"),
        ("return", "retrun", r"edited.effc:\d+:\d+"),
    ],
)
def test_bad_edits(was: str, now: str, message: str, source: Source, tmp_path: Path) -> None:
    transform_text = dump(driver.lower(source).module)
    assert was in transform_text
    (tmp_path / "edited.effc").write_text(transform_text.replace(was, now))
    with pytest.raises(EffcError, match=message):
        optimize(source, tmp_path / "out", replace(QUIET, ir=tmp_path / "edited.effc"))
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept(source: Source, tmp_path: Path) -> None:
    optimize(source, tmp_path / "out", QUIET)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(EffcError, match="out: is there already, want a new folder"):
        optimize(source, tmp_path / "out", QUIET)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    optimize(source, tmp_path / "out", replace(QUIET, force=True, passes="quant8"))
    assert Artifact.load(tmp_path / "out").manifest["pipeline"] == "quant8"


@pytest.mark.parametrize("step", ["emit", "evaluate.compare", "write_manifest"])
def test_an_interrupted_run_leaves_nothing(step: str, source: Source, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"effc.driver.{step}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimize(source, tmp_path / "out", replace(QUIET, passes="quant8"))
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_named(source: Source, tmp_path: Path) -> None:
    class Broken:
        names, spec = source.weights.names, source.weights.spec

        def read(self, name: str) -> np.ndarray:
            array = np.array(source.weights.read(name))
            if name == "up/kernel":
                array[3, 4] = np.nan
            return array

    with pytest.raises(EffcError, match=r"NaN|not finite"):
        optimize(replace(source, weights=Broken()), tmp_path / "out", QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_text_without_a_tokenizer(source: Source, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text")
    with pytest.raises(EffcError, match=r"small: no tokenizer, so .*text cannot be evaluated"):
        optimize(source, tmp_path / "out", replace(QUIET, eval_text=tmp_path / "text"))


@dataclass(frozen=True)
class _Liar(Pass):
    """Calls itself exact, and codes the weights."""

    name: ClassVar[str] = "liar"
    phase: ClassVar[Phase] = Phase.CLEAN
    exactness: ClassVar[Exactness] = Exactness.EXACT
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, module: Module, notes: Notes) -> Module:
        return Quant4(group=0, embed=4, head=4).run(module, notes)

    def made(self, before: Module, after: Module, store):
        return Quant4().made(before, after, store)


def test_an_exact_pass_that_moves_logits_is_an_error(source: Source, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(PASSES, "liar", _Liar)
    with pytest.raises(PassError, match=r"liar: is exact, but moved logits by .* of their range"):
        optimize(source, tmp_path / "out", replace(QUIET, passes="liar"))
    assert not (tmp_path / "out").exists()


def test_transform_is_structure_alone(tiny: Module, tmp_path: Path) -> None:
    after, steps = transform(tiny, "fuse,clean", dump=tmp_path)
    assert [step.made_by.name for step in steps] == ["clean", "fuse"]
    assert parse((tmp_path / "02-fuse.effc").read_text()) == after


def test_calibration_text_that_nothing_uses_is_said(source: Source, tmp_path: Path) -> None:
    (tmp_path / "calib.txt").write_text("text")
    report = optimize(source, tmp_path / "out", replace(QUIET, calib=tmp_path / "calib.txt"))
    assert "calib.txt is not used: no pass of this pipeline calibrates" in report.notes
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["calibrated_on"]) == 64
