"""What every test gets: one CPU, strict arrays, golden files and the bundled checkpoint."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
ORACLES = ("torch", "transformers")

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files; review the diff")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ORACLES if importlib.util.find_spec(name) is None]
    if missing:
        skip = pytest.mark.skip(reason=f"needs {', '.join(missing)}: pip install 'effc[oracle]'")
        for item in items:
            if item.get_closest_marker("oracle"):
                item.add_marker(skip)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """golden(text) holds text against tests/golden/<test file>/<test name>.txt; `part` for several a test."""
    folder = GOLDEN / request.path.relative_to(Path(__file__).parent).with_suffix("")
    name = re.sub(r"[^\w.=-]+", "-", request.node.name).strip("-")

    def check(text: str, part: str = "") -> None:
        file = folder / f"{name}{f'.{part}' if part else ''}.txt"
        if request.config.getoption("--update-golden"):
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert file.exists(), f"{file.relative_to(ROOT)} is not there: pytest --update-golden writes it"
        assert text == file.read_text(), f"differs from {file.relative_to(ROOT)} (pytest --update-golden)"

    return check


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The bundled 12-layer model, with its tokenizer."""
    return ROOT / "examples" / "stdlib12" / "model.ckpt"


@pytest.fixture(scope="session")
def heldout() -> Path:
    """Text the bundled model was not trained on."""
    return ROOT / "examples" / "stdlib12" / "heldout.txt"
