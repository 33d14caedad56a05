"""Every file of examples/ runs as its docstring says."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import effc

EXAMPLES = Path(__file__).parent.parent / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(name, arguments...) -> what it prints."""

    def call(name: str, *words: object) -> str:
        monkeypatch.setattr("sys.argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_quantize_then_generate(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    printed = run("quantize.py", checkpoint, tmp_path / "out")
    assert printed.startswith("24.4 MB -> 3.")
    assert "quant4{group=64} - " in printed
    printed = run("generate.py", tmp_path / "out", "import os")
    assert "\n---\n" in printed and len(printed.splitlines()[-2:]) == 2


def test_edit_ir(run: Run, checkpoint: Path) -> None:
    module = effc.parse(run("edit_ir.py", checkpoint))
    coded = [p for p in module.params.values() if str(p.type).startswith("q8{channel")]
    assert len(coded) == 7


def test_your_own_model(run: Run, tmp_path: Path) -> None:
    printed = run("your_own_model.py", tmp_path / "out")
    assert "110080 -> 32768 bytes" in printed


def test_none_is_forgotten() -> None:
    here = Path(__file__).read_text()
    assert all(f'run("{file.name}"' in here for file in EXAMPLES.glob("*.py"))
