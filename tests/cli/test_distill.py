"""`effc distill` on a checkpoint of two small layers: students of layers, of checkpoints, of code; refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

import effc
from effc.artifact import Artifact, verify
from effc.cli import main
from effc.errors import EffcError
from effc.opened import Opened, open_model

Capture = pytest.CaptureFixture[str]

CODE = """
from flax import linen as nn


class Small(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(96)(nn.silu(nn.Embed(96, self.width)(tokens)))


def build(width=8):
    return Small(width)
"""

QUICK = ["--no-speed", "--rows", "4", "--length", "24"]


@pytest.fixture(scope="module")
def teacher(tiny: Path) -> Opened:
    return open_model(tiny)


@pytest.fixture(scope="module")
def report(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Of `effc distill --layers 1`, and the artifact."""
    out = tmp_path_factory.mktemp("student") / "out"
    line = ["--layers", "1", "--from", tiny, "--text", text, "--eval", text, "--budget", "40", "--lr", "0.01"]
    assert main(list(map(str, ["distill", *line, *QUICK, "-o", out]))) == 0
    return json.loads((out / "report.json").read_text()), out


def test_a_student_of_the_teachers_layers(report: tuple[dict, Path], teacher: Opened) -> None:
    told, out = report
    assert verify(out) == []
    found = Artifact.load(out)
    stacked = [param for param in found.module.params.values() if param.stack]
    assert stacked and all(param.path.startswith("layers 0 of ") and param.stack == 1 for param in stacked)
    assert told["after"]["parameters"] < told["before"]["parameters"]
    assert told["after"]["quality"]["kl"] > 0
    assert found.manifest["trained_on"].keys() == {"text.txt"}
    assert found.tokenizer == teacher.files
    assert not list(out.parent.glob(".out*"))


def test_the_report_shows_before_during_after_and_the_text_alone(report: tuple[dict, Path]) -> None:
    taught, alone = (made_by["trained"][0] for made_by in report[0]["passes"])
    assert taught["steps"] == alone["steps"] == 40
    assert (
        [look["step"] for look in taught["looks"]]
        == [look["step"] for look in alone["looks"]]
        == [0, 8, 16, 24, 32, 40]
    )
    first, last = taught["looks"][0]["values"], taught["looks"][-1]["values"]
    assert alone["looks"][0]["values"] == first
    assert last["kl"] < 0.5 * first["kl"]
    assert last["kl"] < alone["looks"][-1]["values"]["kl"]  # the teacher is random: its text tells nothing of it
    assert last["kl"] == pytest.approx(report[0]["after"]["quality"]["kl"], rel=0.05)


def test_python_gives_the_same_numbers_as_the_command(
    report: tuple[dict, Path], teacher: Opened, text: Path, tmp_path: Path
) -> None:
    options = {"text": text, "eval_text": text, "budget": "40", "lr": 0.01, "rows": 4, "length": 24}
    told = effc.distill(teacher, tmp_path / "out", layers=[0], baseline=False, speed=False, **options)
    assert told.report.after.quality is not None
    assert told.report.after.quality.kl == pytest.approx(report[0]["after"]["quality"]["kl"], rel=1e-5)
    assert math.isclose(told.runs["distill{fkl,alpha=1}"].looks[0].values["kl"], _first(report[0]), rel_tol=1e-5)


def _first(told: dict) -> float:
    return told["passes"][0]["trained"][0]["looks"][0]["values"]["kl"]


@pytest.mark.slow
def test_a_student_of_code_learns_from_samples_of_the_teacher(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "small.py").write_text(CODE)
    line = [f"{tmp_path}/small.py:build", "--config", '{"width": 4}', "--from", str(tiny), "--budget", "6"]
    more = ["--loss", "jsd", "--beta", "0.2", "--alpha", "0.8", "--on-policy", "0.5", "--temperature", "2"]
    assert main(["distill", *line, *more, *QUICK, "--no-baseline", "--json", "-o", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pipeline"] == "distill{jsd,beta=0.2,alpha=0.8,temperature=2,on_policy=0.5}"
    assert "trained on samples of the teacher's own" in told["notes"]
    assert len(told["passes"]) == 1
    assert told["after"]["parameters"] == 96 * 4 + 4 * 96 + 96
    assert verify(tmp_path / "out") == []


@pytest.mark.slow
def test_a_student_that_is_a_checkpoint(tiny: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    line = ["distill", str(tiny), "--from", str(tiny), "--text", str(text), "--budget", "1", "--lr", "1e-9", *QUICK]
    assert main([*line, "--no-baseline", "-o", str(tmp_path / "out")]) == 0
    assert "KL to the teacher" in capsys.readouterr().out
    assert Artifact.load(tmp_path / "out").report()["after"]["quality"]["kl"] < 1e-4  # as it was: its own teacher


REFUSED = {
    "": "want a STUDENT, or --layers",
    "{tiny} --layers 1": "want a STUDENT, or --layers",
    "--layers 3": "layers=3: want 1 to 2",
    "--layers 1,0": "want numbers of 0 to 1 in rising order",
    "--layers 0,7": "want numbers of 0 to 1",
    "--layers few": "layers 'few': want how many (5), or which",
    "--layers 1 --budget long": "budget 'long': want steps",
    "--layers 1 --alpha 2": "alpha 2: want 0",
    "--layers 1 --loss jsd --beta 3": "beta 3: want 0",
    "--layers 1 --temperature 0": "temperature 0: want more than 0",
    "--layers 1 --on-policy 2": "on-policy 2: want a share",
    "--layers 1 --accumulate 3": "rows 16: want a multiple of accumulate=3",
    "--layers 1 --budget 0": "budget 0: want some steps",
    "--layers 1 --text {tiny}/nothing.txt": "nothing.txt: No such file",
    "{tiny}/none": "no such file",
    "nothing.py:build": "no file nothing.py",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line: str, tiny: Path, text: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    words = line.format(tiny=tiny, text=text).split()
    refused(["distill", *words, "--from", tiny, "--no-speed", "-o", tmp_path / "out"], REFUSED[line])
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_is_refused(teacher: Opened, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(CODE.replace("Dense(96)", "Dense(95)"))
    from effc.opened import open_fresh

    with pytest.raises(EffcError, match="95 tokens, want 96"):
        effc.distill(teacher, tmp_path / "out", open_fresh(f"{tmp_path}/small.py:build", {}, teacher))


def test_layers_and_student_together_are_refused(teacher: Opened, tmp_path: Path) -> None:
    with pytest.raises(EffcError, match="one of them"):
        effc.distill(teacher, tmp_path / "out", teacher, layers=1)
