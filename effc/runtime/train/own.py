"""A model's own samples, to train on where there is no text: made once, kept on disk, the same for the same seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.sampling import Sampling
from effc.runtime.train.plan import Batch, Batches, Tree


@dataclass
class OwnText:
    """Samples of `length`+1 tokens at temperature 1, made `rows` at a time when they are first wanted.

    starts: tokens that texts may begin with. folder keeps what is made; `most` chunks, then they come again.
    """

    engine: Engine
    starts: Sequence[int]
    length: int
    seed: int = 0
    rows: int = 16
    most: int = 128
    folder: Path | None = None

    def __post_init__(self) -> None:
        self._made: dict[int, np.ndarray] = {}

    def chunk(self, number: int) -> np.ndarray:
        """i32[rows,length+1], the number-th modulo `most`."""
        number %= self.most
        if number not in self._made:
            self._made[number] = self._kept(number)
        return self._made[number]

    def batch(self, rows: int, step: int) -> Batch:
        """As `windows` gives them; all that is made comes before any comes again."""
        at = [divmod(i, self.rows) for i in range(step * rows, (step + 1) * rows)]
        tokens = np.stack([self.chunk(number)[row] for number, row in at])
        return {"tokens": tokens, "mask": np.ones((rows, self.length), bool)}

    def batches(self, rows: int) -> Batches:
        """For `fit`."""

        def call(step: int, params: Tree) -> Batch:
            return self.batch(rows, step)

        return call

    def _kept(self, number: int) -> np.ndarray:
        if self.folder is None:
            return self._generated(number)
        file = self.folder / f"own-{self.seed}-{self.rows}x{self.length + 1}-{number:04d}.npy"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial.npy")
            np.save(partial, self._generated(number))
            os.replace(partial, file)
        return np.load(file)

    def _generated(self, number: int) -> np.ndarray:
        first = np.random.default_rng((self.seed, number)).choice(np.asarray(self.starts), self.rows)
        prompts, sampling = [[int(token)] for token in first], Sampling(temperature=1.0)
        seed = self.seed * 100_003 + number
        told = generate(self.engine, prompts, max_new_tokens=self.length, sampling=sampling, stop_ids=(), seed=seed)
        rows = [[*prompt, *new] for prompt, new in zip(prompts, told.tokens, strict=True)]
        return np.asarray(rows, np.int32)
