"""A module with its arrays, in memory's terms and on disk, between two steps of the driver."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc import artifact, evaluate
from effc.artifact import WEIGHTS
from effc.ir.core import Module
from effc.weights import Store, open_safetensors, write_safetensors


@dataclass(frozen=True)
class State:
    """A module and its arrays, and the files they lie in where they were written."""

    module: Module
    store: Store
    files: tuple[Path, ...] = ()

    @property
    def side(self) -> evaluate.Side:
        """As the evaluator takes it."""
        return self.module, self.store


def written(state: State, folder: Path, advance: Any = None) -> State:
    """The same module, its arrays in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    artifact.write_module(folder, state.module)
    files = write_safetensors(folder / WEIGHTS, state.module, state.store, progress=advance)
    return State(state.module, open_safetensors(folder / WEIGHTS, state.module), tuple(files))


def placed(state: State, work: Path, advance: Any) -> State:
    """The arrays in the artifact: moved there where they are on disk already."""
    if not state.files:
        return written(state, work, advance)
    files = tuple(file.rename(work / file.name) for file in state.files)
    return State(state.module, open_safetensors(work / WEIGHTS, state.module), files)


class scratch:
    """A folder inside the artifact being made, gone before its files are listed."""

    def __init__(self, work: Path):
        self.work = work

    def __enter__(self) -> Path:
        self.path = Path(tempfile.mkdtemp(prefix=".scratch-", dir=self.work))
        return self.path

    def __exit__(self, *failure: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
