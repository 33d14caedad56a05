"""Token by token: what a model loses against the model it was made of, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc import evaluate
from effc.evaluate import Windows
from effc.ir.stream import Piece

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Figure:
    """A mean over tokens and its standard error."""

    value: float
    error: float

    @staticmethod
    def of(values: Numbers) -> Figure:
        return Figure(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))

    def percent(self) -> str:
        return f"{self.value:+.2%} ± {self.error:.2%}"

    def nats(self) -> str:
        return f"{self.value:.5f} ± {self.error:.5f}"


@dataclass(frozen=True)
class Judged:
    """Of every scored token f64[n]: nats by either model, their divergence, whether both find the same likeliest."""

    before: Numbers
    after: Numbers
    apart: Numbers
    same: Numbers

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.after.mean()))

    def change(self) -> Figure:
        """Of perplexity, as a share of it; tokens are paired."""
        return share(self.after - self.before)

    def kl(self) -> Figure:
        return Figure.of(self.apart)


def share(nats: Numbers) -> Figure:
    """What such differences of a token's nats do to perplexity."""
    more = Figure.of(nats)
    grown = float(np.exp(more.value))
    return Figure(grown - 1, grown * more.error)


class Judge:
    """Logits of a model on a text, in a file of `folder`; others are held against them."""

    def __init__(self, pieces: Iterable[Piece], text: Windows, vocab: int, folder: Path):
        self.text, self.starts = text, np.cumsum([0, *(chunk.shape[1] for chunk in text.chunks)])
        folder.mkdir(parents=True, exist_ok=True)
        self.logits = np.memmap(folder / "judge.f32", np.float32, "w+", shape=(int(self.starts[-1]), vocab))
        for piece in pieces:
            self._rows(piece)[:] = np.asarray(piece.logits[0], np.float32)

    def judged(self, pieces: Iterable[Piece]) -> Judged:
        """Of another model's logits on the same text."""
        found = [row for piece in pieces for row in self._scored(piece)]
        columns = np.concatenate(found, axis=1).astype(np.float64)
        evaluate.check_finite(columns, "judge")
        return Judged(*columns)

    def _rows(self, piece: Piece) -> Numbers:
        at = int(self.starts[piece.chunk]) + piece.start
        return self.logits[at : at + piece.logits.shape[1]]

    def _scored(self, piece: Piece) -> list[Numbers]:
        ids, at = self.text.chunks[piece.chunk][0], piece.start + np.arange(piece.logits.shape[1])
        scored = (at >= self.text.context - 1) & (at + 1 < len(ids))
        targets = ids[np.minimum(at + 1, len(ids) - 1)]
        return [np.asarray(_columns()(self._rows(piece), piece.logits[0], targets))[:, scored]]


@cache
def _columns() -> Any:
    def call(p: jax.Array, q: jax.Array, targets: jax.Array) -> jax.Array:
        p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (p, q))
        told = [-jnp.take_along_axis(x, targets[:, None], -1)[:, 0] for x in (p, q)]
        same = (jnp.argmax(p, -1) == jnp.argmax(q, -1)).astype(jnp.float32)
        return jnp.stack([*told, jnp.sum(jnp.exp(p) * (p - q), -1), same])

    return jax.jit(call)
