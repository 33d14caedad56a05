"""What a drafter learns from: what the target made of texts, read once and kept on disk a chunk of texts at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

TOP = 16
"""Likeliest tokens of the target that are learned from."""

FIELDS = ("tokens", "spans", "ids", "logits", "features")


@dataclass(frozen=True)
class Lesson:
    """chunks of texts: tokens i32[n,t]; spans i32[n,2], from where to where a text is learned from;
    ids i32, logits f16 [n,t,TOP] of what the target would say next; features f16[n,t,d] where a head reads them.
    folder: where it lies on disk.
    """

    chunks: Sequence[Mapping[str, np.ndarray]]
    seconds: float = 0.0
    folder: Path | None = None

    @cached_property
    def texts(self) -> int:
        """How many there are."""
        return int(self._ends[-1])

    @cached_property
    def _ends(self) -> np.ndarray:
        """How many texts there are up to the end of each chunk."""
        return np.cumsum([len(chunk["tokens"]) for chunk in self.chunks])

    @cached_property
    def tokens(self) -> int:
        """How many are learned from."""
        return int(sum(np.diff(chunk["spans"], axis=1).sum() for chunk in self.chunks))

    @property
    def features(self) -> bool:
        """Whether a head's are there."""
        return "features" in self.chunks[0]

    def rows(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """These texts."""
        ends = self._ends
        at = [(chunk := int(np.searchsorted(ends, n, "right")), n - ends[chunk]) for n in numbers]
        return {name: np.stack([self.chunks[c][name][i] for c, i in at]) for name in self.chunks[0]}

    def said(self, vocab: int) -> np.ndarray:
        """f64[vocab]: how often the target would say each token."""
        total = np.zeros(vocab)
        for chunk in self.chunks:
            logits = chunk["logits"].astype(np.float32)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            weights *= learned(chunk["spans"], logits.shape[1])[..., None] / weights.sum(axis=-1, keepdims=True)
            total += np.bincount(chunk["ids"].ravel(), weights.ravel(), vocab)
        return total


def learned(spans: np.ndarray, length: int) -> np.ndarray:
    """bool[n,length]: positions after which what the target says is learned: from before a span to its last."""
    index = np.arange(length)[None, :]
    return (index >= spans[:, :1] - 1) & (index < spans[:, 1:])


@dataclass(frozen=True)
class Chunk(Mapping[str, np.ndarray]):
    """The arrays in a folder. Each use maps them anew: what was read of a map counts as memory as long as it lives."""

    folder: Path

    def __getitem__(self, name: str) -> np.ndarray:
        file = self.folder / f"{name}.npy"
        if not file.exists():
            raise KeyError(name)
        return np.load(file, mmap_mode="r")

    def __iter__(self) -> Iterator[str]:
        return (file.stem for file in sorted(self.folder.glob("*.npy")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def kept(folder: Path) -> Iterator[Chunk]:
    """The chunks in a folder."""
    return map(Chunk, sorted(folder.glob("[0-9]*")))


def drop(folder: Path, first: int) -> None:
    """Without the chunks from this number on."""
    for part in sorted(folder.glob("[0-9]*"))[first:]:
        shutil.rmtree(part)


def keep(folder: Path, number: int, chunk: Mapping[str, np.ndarray]) -> None:
    """A chunk on disk, whole or not at all."""
    part = folder / f".{number:05d}"
    part.mkdir(parents=True, exist_ok=True)
    for name, array in chunk.items():
        np.save(part / f"{name}.npy", array)
    os.replace(part, folder / f"{number:05d}")
