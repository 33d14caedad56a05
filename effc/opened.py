"""A model wherever it is: checkpoint of any format, artifact, or IR file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from effc.artifact import MODEL, Artifact, is_artifact, read_module
from effc.frontend.source import TokenizerFiles
from effc.frontend.tokenizer import Tokenizer
from effc.ir import Module
from effc.weights import Store


@dataclass(frozen=True)
class Opened:
    """A module with its weights; no array is read."""

    path: Path
    module: Module
    store: Store
    files: TokenizerFiles | None = None
    notes: tuple[str, ...] = ()

    def tokenizer(self) -> Tokenizer:
        """EffcError where the model came without one."""
        return Tokenizer(self.files, str(self.path))


@dataclass(frozen=True)
class Structure:
    """A module alone, and what the lowering had to say of it."""

    module: Module
    notes: tuple[str, ...] = field(default=())


def open_model(path: Path, *, module: str | None = None, dtype: str | None = None) -> Opened:
    """An artifact as it is; a checkpoint lowered, without any pass."""
    if is_artifact(path):
        found = Artifact.load(path)
        return Opened(path, found.module, found.store, found.tokenizer)
    from effc.frontend import lower
    from effc.frontend.checkpoints import open_checkpoint

    source = open_checkpoint(path, module=module, dtype=dtype)
    lowered = lower(source)
    return Opened(path, lowered.module, lowered.store, source.tokenizer, tuple(map(str, lowered.notes)))


def open_structure(path: Path, *, module: str | None = None, dtype: str | None = None) -> Structure:
    """As open_model, and IR files too."""
    if path.suffix == ".effc":
        return Structure(read_module(path))
    if is_artifact(path):
        return Structure(read_module(path / MODEL))
    opened = open_model(path, module=module, dtype=dtype)
    return Structure(opened.module, opened.notes)
