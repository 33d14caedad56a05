"""What the package says of itself is so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORTED_AS = {"orbax-checkpoint": "orbax", "ml-dtypes": "ml_dtypes"}


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[\[<>=~!]", line)[0] for line in requirements]


def imported() -> set[str]:
    """Top-level packages that effc's own files import, standard library left out."""
    found: set[str] = set()
    for file in (ROOT / "effc").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"effc"}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    declared = {IMPORTED_AS.get(name, name) for name in names(PROJECT["dependencies"])}
    optional = {name for extra in ("gguf", "export") for name in names(PROJECT["optional-dependencies"][extra])}
    used = imported()
    assert used <= declared | optional
    assert declared <= used


def test_the_readme_has_a_reason_for_every_dependency() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## What it stands on") :]
    assert all(re.search(rf"\b{re.escape(name)}\b", table) for name in names(PROJECT["dependencies"]))


def test_links_of_the_documents_lead_somewhere() -> None:
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_commands_of_the_readme_parse() -> None:
    import shlex

    from effc.cli import make_parser

    lines = re.findall(r"^\$ effc (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        make_parser().parse_args(shlex.split(line))


def test_ci_runs_what_make_test_runs() -> None:
    assert re.search(r"^make test ", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


@pytest.mark.parametrize("target", ["demo", "test", "check", "conformance", "bench"])
def test_every_target_sets_itself_up(target: str, tmp_path: Path) -> None:
    """On a fresh machine the first commands make the environment and install into it."""
    ask = ["make", "-n", target, f"VENV={tmp_path / 'venv'}"]
    plan = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert plan.index("-m venv") < plan.index("pip install") < plan.index("touch")


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60
