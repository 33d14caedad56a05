"""A model wherever it is: checkpoint of any format, artifact, or IR file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effc.artifact import MODEL, Artifact, is_artifact, read_module
from effc.frontend.source import Source, TokenizerFiles
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
    from effc.frontend.checkpoints import open_checkpoint

    return of_source(open_checkpoint(path, module=module, dtype=dtype), path)


def of_source(source: Source, path: Path | None = None) -> Opened:
    """A model lowered, without any pass."""
    from effc.frontend import lower

    lowered = lower(source)
    notes = tuple(map(str, lowered.notes))
    return Opened(path or Path(source.name), lowered.module, lowered.store, source.tokenizer, notes)


def open_fresh(ref: str, config: Mapping[str, Any], like: Opened, seed: int = 0) -> Opened:
    """What `FILE.py:FUNC` builds, untrained, with the context and tokenizer of another model."""
    from effc.frontend.fresh import fresh

    context = like.module.meta.get("context")
    context = context if isinstance(context, int) and context > 0 else None
    return of_source(fresh(ref, config, seed=seed, context=context, tokenizer=like.files), Path(ref))


def open_structure(path: Path, *, module: str | None = None, dtype: str | None = None) -> Structure:
    """As open_model, and IR files too."""
    if path.suffix == ".effc":
        return Structure(read_module(path))
    if is_artifact(path):
        return Structure(read_module(path / MODEL))
    opened = open_model(path, module=module, dtype=dtype)
    return Structure(opened.module, opened.notes)
