"""What a drafter learned, kept beside its lesson: when more was read, or weights are to be coded another way, it
learns on from there, not from the start."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effc.passes.draft.lesson import Lesson


def keep(lesson: Lesson, arrays: Mapping[str, np.ndarray], how: str) -> None:
    """Arrays by their path in the program's parameters, whole or not at all; how: what tells this run from others."""
    if lesson.folder is None:
        return
    file = _file(lesson, how)
    part = file.with_suffix(".part")
    with part.open("wb") as to:
        np.savez(to, **dict[str, Any](arrays))
    os.replace(part, file)


def latest(lesson: Lesson, like: Mapping[str, Any], how: str) -> tuple[int, dict[str, np.ndarray]] | None:
    """The number of texts, and the arrays that another run learned from most of them, the last of such; of the same
    names and shapes as `like`."""
    if lesson.folder is None:
        return None
    wanted = {name: array.shape for name, array in like.items()}
    by_texts = {file: int(file.stem.split("-")[1]) for file in lesson.folder.glob("taught-*.npz")}
    for file in sorted(by_texts, key=lambda file: (by_texts[file], file.stat().st_mtime), reverse=True):
        texts = by_texts[file]
        if texts > lesson.texts or file == _file(lesson, how):  # a run that is resumed begins where it began
            continue
        with np.load(file) as stored:
            found = {name: stored[name] for name in stored.files}
        if {name: array.shape for name, array in found.items()} == wanted:
            return texts, found
    return None


def _file(lesson: Lesson, how: str) -> Path:
    assert lesson.folder is not None
    return lesson.folder / f"taught-{lesson.texts}-{hashlib.sha256(how.encode()).hexdigest()[:8]}.npz"
