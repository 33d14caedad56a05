"""Imports run one way: cli -> driver -> pipeline -> the compiler's parts -> ir, weights, runtime, models."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "effc"

FLOORS: dict[str, int] = {
    "errors": 0, "memory": 0, "widths": 0, "curves": 0, "exclusive": 1,
    "ir": 1, "runtime": 1, "models": 1, "calibration": 1,
    "weights": 2, "timing": 2,
    "passes": 3, "frontend": 3, "backend": 3, "report": 3, "artifact": 3, "evaluate": 3, "certificate": 3,
    "divergence": 3,
    "pipeline": 4, "opened": 4, "plan": 4, "predict": 4, "speed": 4, "comparing": 4, "edited": 4, "clock": 4,
    "listing": 4, "summary": 4, "state": 4,
    "healing": 5, "bisect": 5, "running": 5, "driver": 5, "distilling": 5, "measure": 5, "generator": 5, "doctor": 5,
    "api": 6, "programs": 6, "cli": 7,
}  # fmt: skip
"""A module may import its own floor and those below."""

RUNTIME_MAY = {"jax", "jaxlib", "numpy", "ml_dtypes", "safetensors", "effc"}
STANDARD = sys.stdlib_module_names
BARE = {"ir", "passes", "runtime"}

FILES = sorted(ROOT.rglob("*.py"))


def part(name: str) -> str:
    """`effc.ir.core` -> `ir`."""
    return name.split(".")[1] if "." in name else ""


def imports(file: Path, *, at_once: bool = False) -> Iterator[str]:
    """Modules a file imports by full name: anywhere, or when it is imported itself."""
    tree = ast.parse(file.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import, want `effc.` in front"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_part_has_a_floor() -> None:
    parts = {home(file) for file in FILES} - {"__init__"}
    assert parts <= FLOORS.keys(), f"no floor for {sorted(parts - FLOORS.keys())}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    mine = home(file)
    if mine == "__init__":  # re-exports, imported when first used
        return
    for name in imports(file):
        if name.startswith("effc.") and part(name) in FLOORS:
            assert FLOORS[part(name)] <= FLOORS[mine], f"{file.name} imports {name}: {part(name)} is above {mine}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_private_jax_and_no_bare_names(file: Path) -> None:
    for name in imports(file):
        assert not name.startswith("jax._src"), f"{file} imports {name}, private to jax"
        assert name.split(".")[0] not in BARE, f"{file} imports {name}, want effc.{name}"


@pytest.mark.parametrize("file", sorted((ROOT / "runtime").rglob("*.py")), ids=lambda f: f.name)
def test_the_runtime_needs_jax_alone(file: Path) -> None:
    if file.name == "train.py":
        return
    for name in imports(file, at_once=True):
        top = name.split(".")[0]
        assert top in RUNTIME_MAY or top in STANDARD, f"{file.name} imports {name}"
        mine = part(name) in {"runtime", "errors", "widths"}
        assert top != "effc" or mine, f"{file.name} imports {name} of the compiler"


@pytest.mark.parametrize("file", sorted((ROOT / "ir").rglob("*.py")), ids=lambda f: f.name)
def test_the_ir_has_no_jax_but_in_the_interpreter(file: Path) -> None:
    if file.name not in {"interpret.py", "interpret_early.py", "stream.py", "routed.py"}:
        assert not any(name.split(".")[0] in {"jax", "flax"} for name in imports(file))
        assert not any(name.startswith("effc.runtime") for name in imports(file))
