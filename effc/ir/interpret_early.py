"""What `early` means: every layer runs, and tokens that have left stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from effc.ir.core import Op
from effc.ir.ops import attribute
from effc.runtime import exits

Call = Callable[[Sequence[Sequence[Array]], int], Sequence[Sequence[Array]]]
"""(operands of every chunk, states x[b,t,d] first; number of the layer or exit) -> results of each chunk."""


class Tokens:
    """One chunk: states, what is shown of them so far, who has left, how many layers each ran."""

    def __init__(self, x: Array, deferred: bool = False):
        self.x, self.before, self.deferred = x, x, deferred
        self.kept: list[Array] = []  # what layers after the exit read beside x, where they share its state
        self.shown: Array | None = None
        self.left = jnp.zeros(x.shape[:2], bool)
        self.layers = jnp.zeros(x.shape[:2], jnp.int32)

    def step(self, x: Array, layer: int) -> None:
        """After a layer: those that have left stay as they are, or run it later, which comes to the same as now."""
        self.before, self.x = self.x, x if self.deferred else jnp.where(self.left[:, :, None], self.x, x)
        self.layers = jnp.where(self.left, self.layers, layer + 1)

    def show(self, logits: Array, leaves: Array) -> None:
        """Logits of those still here; who leaves with them."""
        self.shown = logits if self.shown is None else jnp.where(self.left[:, :, None], self.shown, logits)
        self.left = self.left | leaves


@dataclass(frozen=True)
class Calls:
    """What `early` runs, by role; `after` where later layers are other blocks, `say` the head at exits."""

    block: Call
    exit: Call
    head: Call
    say: Call
    after: Call | None = None


def leave_early(op: Op, chunks: Sequence[Tokens], calls: Calls) -> None:
    """Run all layers; each chunk ends with its logits and layer counts."""
    times, at = attribute(op, "times"), attribute(op, "exits")
    assert isinstance(times, int) and isinstance(at, tuple)
    for layer in range(times):
        run = calls.block if calls.after is None or layer < int(str(at[0])) else calls.after
        for tokens, (x,) in zip(chunks, run([[c.x, *c.kept] for c in chunks], layer), strict=True):
            tokens.step(x, layer)
        if layer + 1 in at:
            out = calls.exit([[c.x] for c in chunks], at.index(layer + 1))
            logits = calls.say([[o[0]] for o in out], 0)
            for tokens, (shown,), results in zip(chunks, logits, out, strict=True):
                tokens.show(shown, _leaves(op, tokens, shown, results))
                tokens.kept = [] if calls.after is None else [tokens.x]
    for tokens, (shown,) in zip(chunks, calls.head([[c.x] for c in chunks], 0), strict=True):
        tokens.show(shown, tokens.left)


def _leaves(op: Op, tokens: Tokens, logits: Array, results: Sequence[Array]) -> Array:
    """bool[b,t] at the beginning of a text, where a threshold has not decayed."""
    measure, rows, threshold = (attribute(op, name) for name in ("measure", "rows", "threshold"))
    assert isinstance(threshold, (int, float))
    start = jnp.zeros(tokens.x.shape[0], jnp.float32)
    limit = exits.decayed(threshold, start, str(attribute(op, "decay")), float(str(attribute(op, "tau"))))[:, None]
    sure = {
        "softmax": lambda: exits.margin(logits),
        "softmax_max": lambda: exits.likeliest(logits),
        "state": lambda: exits.similarity(tokens.x, tokens.before),
        "classifier": lambda: 1 / (1 + jnp.exp(-results[1][..., 0].astype(jnp.float32))),
    }[str(measure)]()
    enough = (sure >= limit) & (limit < 1)
    return jnp.all(enough | tokens.left, axis=0, keepdims=True) if rows == "wait" else enough
