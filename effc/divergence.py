"""How far variants of a model are from it: its logits on a text lie on disk, each variant is held against them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from effc.evaluate import Side, Windows, check_finite, pieces, vocab_of

FILE = "logits.f32"


class Reference:
    """Logits f32[tokens,V] of a model on a text, in a file of `folder`."""

    def __init__(self, side: Side, text: Windows, folder: Path):
        self.text = text
        self.starts = np.cumsum([0, *(chunk.shape[1] for chunk in text.chunks)])
        shape = (int(self.starts[-1]), vocab_of(side[0]))
        folder.mkdir(parents=True, exist_ok=True)
        self.logits = np.memmap(folder / FILE, np.float32, "w+", shape=shape)
        for piece in pieces(side, text):
            self._rows(piece.chunk, piece.start, piece.logits.shape[1])[:] = np.asarray(piece.logits[0], np.float32)

    def divergence(self, side: Side) -> float:
        """KL(reference || side), mean nats a token of the text."""
        total, count = 0.0, 0
        for piece in pieces(side, self.text):
            mine = piece.logits[0]
            total += float(_apart()(self._rows(piece.chunk, piece.start, len(mine)), mine))
            count += len(mine)
        check_finite(np.asarray(total), "divergence")
        return max(0.0, total / max(count, 1))

    def _rows(self, chunk: int, start: int, count: int) -> np.ndarray:
        at = int(self.starts[chunk]) + start
        return self.logits[at : at + count]


@cache
def _apart() -> Callable[..., jax.Array]:
    """Sum over rows of the divergence of q from p."""

    def call(p: jax.Array, q: jax.Array) -> jax.Array:
        log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q.astype(jnp.float32))
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    return jax.jit(call)
