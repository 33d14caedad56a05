"""What a drafter learned, kept beside its lesson: when more was read, it learns on from there, not from the start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effc.passes.draft.lesson import Lesson


def keep(lesson: Lesson, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays by their path in the program's parameters, whole or not at all."""
    if lesson.folder is None:
        return
    file = _file(lesson.folder, lesson.texts)
    part = file.with_suffix(".part")
    with part.open("wb") as to:
        np.savez(to, **dict[str, Any](arrays))
    os.replace(part, file)


def latest(lesson: Lesson, like: Mapping[str, Any]) -> tuple[int, dict[str, np.ndarray]] | None:
    """The number of texts, fewer than this lesson's, and the arrays that were learned from most of them; of the same
    names and shapes as `like`."""
    if lesson.folder is None:
        return None
    wanted = {name: array.shape for name, array in like.items()}
    for texts in sorted((int(file.stem.split("-")[1]) for file in lesson.folder.glob("taught-*.npz")), reverse=True):
        if texts >= lesson.texts:  # what this very lesson taught: a run that is resumed begins where it began
            continue
        with np.load(_file(lesson.folder, texts)) as stored:
            found = {name: stored[name] for name in stored.files}
        if {name: array.shape for name, array in found.items()} == wanted:
            return texts, found
    return None


def _file(folder: Path, texts: int) -> Path:
    return folder / f"taught-{texts}.npz"
