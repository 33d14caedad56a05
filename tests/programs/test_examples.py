"""The six patterns and the cascade of examples/programs/, on the bundled model (algorithms 6.2)."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from effc.programs import LM

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "programs"


def example(name: str) -> dict[str, Any]:
    """Its names."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_scratchpad(bundled: LM, capsys: pytest.CaptureFixture[str]) -> None:
    example("scratchpad")["main"](bundled.model, n=2, tokens=4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("-> 'return" in line for line in lines[:2])
    scores = [float(line.rsplit("=", 1)[1]) for line in lines[2:]]
    assert scores[0] > max(scores[1:]) + 2  # the note that says what the line does


def test_chain_of_thought(bundled: LM, capsys: pytest.CaptureFixture[str]) -> None:
    example("chain_of_thought")["main"](bundled.model, n=4, tokens=4)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"if not isinstance\(x, int\): raise \w+Error by \d+% of 4 thoughts; without", lines[0])
    assert "without thoughts TypeError" in lines[0] and "without thoughts ValueError" in lines[1]


def test_star(bundled: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = example("star")
    names["main"](bundled.model, tmp_path / "kept.jsonl", n=4, tokens=4)
    rows = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert rows and all(names["KNOWN"][row["x"]] == row["y"] for row in rows)
    assert len({(row["x"], row["z"]) for row in rows}) == len(rows)
    assert "log p(z, y | x) = -" in capsys.readouterr().out


def test_selection_inference(bundled: LM, capsys: pytest.CaptureFixture[str]) -> None:
    example("selection_inference")["main"](bundled.model, width=2, expand=3, tokens=3)
    printed = capsys.readouterr().out
    assert printed.split("  ")[2].startswith("for line in self.lines")
    assert "hop0/selection" in printed and "hop1/inference" in printed


def test_verifiers(bundled: LM, capsys: pytest.CaptureFixture[str]) -> None:
    names = example("verifiers")
    assert names["unknown_names"]("def f(a):\n    return a + b + len(c)") == ["b", "c"]
    names["main"](bundled.model, n=8, tokens=4)
    first, *rest = capsys.readouterr().out.splitlines()
    assert re.match(r"8 drawn, \d rejected, effective number [\d.]+", first)
    for line in (line for line in rest if "%  return" in line):
        compile("def f():\n    " + line.split("%  ")[1], "answer", "exec")


def test_tool_use(bundled: LM, capsys: pytest.CaptureFixture[str]) -> None:
    samples = example("tool_use")["main"](bundled.model, n=8, tokens=4)
    done = [trace for trace in samples if trace.rejected is None]
    reasons = [trace.rejected for trace in samples if trace.rejected]
    assert done and all(reason.startswith("tool: defined_in: LookupError") for reason in reasons)
    for trace in done:
        _, module, _, name = trace.value.split()
        assert getattr(importlib.import_module(module), name) is not None


def test_defer(bundled: LM, capsys: pytest.CaptureFixture[str]) -> None:
    names = example("defer")
    rows = names["compare"](bundled, bundled, tokens=3)
    assert rows[0][0] == 0 and rows[2][0] == len(names["PROMPTS"])
    assert rows[2][1:] == (2 * rows[0][1], 2 * rows[0][2])
    assert 0 <= rows[1][0] <= 3


@pytest.mark.slow
def test_defer_between_an_optimised_model_and_its_original(capsys: pytest.CaptureFixture[str]) -> None:
    rows = example("defer")["main"]()
    assert rows[0][0] == 0 and rows[1][0] < rows[2][0]


def blocks(page: str) -> list[str]:
    """Python of a page that uses programs; out and the bundled checkpoint are the model given."""
    text = (EXAMPLES.parent.parent / page).read_text()
    found = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "effc.programs" in block]
    return [re.sub(r'LM\("[^"]*"\)', "LM(model)", block) for block in found]


@pytest.mark.parametrize("page", ["README.md", "docs/programs.md"])
def test_what_the_pages_show_runs(page: str, bundled: LM, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(page)
    exec(compile(code, page, "exec"), {"model": bundled.model})
    assert capsys.readouterr().out


def test_programs_are_imported_when_used() -> None:
    line = "import effc, sys; assert not {'effc.programs', 'jax'} & set(sys.modules); print(effc.programs.LM)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "effc.programs.lm.LM" in done.stdout, done.stderr


def test_none_is_forgotten() -> None:
    here = Path(__file__).read_text()
    assert all(f'example("{file.stem}")' in here for file in EXAMPLES.glob("*.py"))
