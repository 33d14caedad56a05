"""A model's own samples, to train on where there is no text: made once, kept on disk, the same for the same seed."""

from __future__ import annotations

import hashlib
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
        file = self.folder / f"{self._name()}-{self.seed}-{self.rows}x{self.length + 1}-{number:04d}.npy"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial.npy")
            np.save(partial, self._generated(number))
            os.replace(partial, file)
        return np.load(file)

    def _name(self) -> str:
        return "own"

    def _generated(self, number: int) -> np.ndarray:
        return self._drawn(number, self.length)

    def _drawn(self, number: int, count: int) -> np.ndarray:
        """i32[rows,count+1]: so many tokens after the first."""
        first = np.random.default_rng((self.seed, number)).choice(np.asarray(self.starts), self.rows)
        return self._said(first[:, None], count, Sampling(temperature=1.0), self.seed * 100_003 + number)

    def _said(self, prompts: np.ndarray, count: int, sampling: Sampling, seed: int = 0) -> np.ndarray:
        """Prompts i32[rows,n] and what follows them, i32[rows,n+count]."""
        rows = prompts.tolist()
        told = generate(self.engine, rows, max_new_tokens=count, sampling=sampling, stop_ids=(), seed=seed)
        return np.asarray([[*row, *new] for row, new in zip(rows, told.tokens, strict=True)], np.int32)


@dataclass
class Continued(OwnText):
    """The likeliest text after prompts of `prompt` tokens: what a model that is served greedily says.

    Prompts of every other chunk are windows of `text` i32[n], where there is one; else they are samples.
    """

    text: np.ndarray | None = None
    prompt: int = 32
    head: tuple[int, ...] = ()
    """What the tokenizer puts before a text."""

    def _name(self) -> str:
        told = "" if self.text is None else hashlib.sha256(self.text.tobytes()).hexdigest()[:16]
        return f"continued{self.prompt}{told}"

    def _generated(self, number: int) -> np.ndarray:
        body, rng = self.prompt - len(self.head), np.random.default_rng((self.seed, number, 1))
        if number % 2 and self.text is not None and len(self.text) >= body:
            at = rng.integers(0, len(self.text) - body + 1, self.rows)
            prompts = np.stack([[*self.head, *self.text[i : i + body]] for i in at]).astype(np.int32)
        else:  # from anywhere in a longer sample: texts are not all at their beginning
            longer = min(4 * self.prompt, self.engine.context or 4 * self.prompt)
            prompts = self._drawn(number, longer - 1)
            at = rng.integers(0, longer - self.prompt + 1, (self.rows, 1))
            prompts = np.take_along_axis(prompts, at + np.arange(self.prompt), axis=1)
        return self._said(prompts, self.length + 1 - self.prompt, Sampling())
