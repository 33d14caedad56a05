"""Drafts copied from what has been read and written: where the last tokens stood before, and went on how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effc.runtime import gain
from effc.runtime.drafting import Choice, Proposal, State, Widths
from effc.runtime.sampling import Numbers

LONGEST = 8
"""Tokens of context compared; longer matches count as this long."""

PRIOR = (0.0, 0.05, 0.15, 0.25, 0.4, 0.55, 0.65, 0.75, 0.9)
"""How often the token after a match of each length is right, before anything was seen."""


@partial(jax.tree_util.register_dataclass, data_fields=("tokens", "lengths"), meta_fields=())
@dataclass(frozen=True)
class Found:
    """tokens i32[b,G] that may follow; lengths i32[b]: how much of the context is the same there, 0 for none."""

    tokens: jax.Array
    lengths: jax.Array


def search(history: jax.Array, known: jax.Array, size: int, longest: int = LONGEST) -> Found:
    """`size` tokens after the latest of the longest matches in history[b,S], whose first known[b] are tokens.

    What follows a match within the draft's own length of the end repeats, as a loop would.
    """
    index = jnp.arange(history.shape[1])[None, :]
    same = jnp.ones(history.shape, bool)
    score = jnp.zeros(history.shape, jnp.int32)
    for back in range(longest):
        shifted = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-1)[:, : history.shape[1]]
        tail = jnp.take_along_axis(history, jnp.maximum(known - 1 - back, 0)[:, None], axis=1)
        same &= (shifted == tail) & (known[:, None] > back)
        score += same
    score = jnp.where(index < known[:, None] - 1, score, 0)
    # Of equal scores the latest: argmax takes the first, so it looks from the end.
    at = history.shape[1] - 1 - jnp.argmax(score[:, ::-1], axis=1)
    period = jnp.maximum(known - 1 - at, 1)
    ahead = at[:, None] + 1 + jnp.arange(size)[None, :] % period[:, None]
    tokens = jnp.take_along_axis(history, ahead, axis=1, mode="clip")
    return Found(tokens, jnp.take_along_axis(score, at[:, None], axis=1)[:, 0])


@dataclass(frozen=True)
class Lookup:
    """The drafter that copies: no weights, no training; it needs the history alone."""

    widths: Widths
    draws = False

    def ahead(self, params: Any, state: State, choice: Choice, chosen: jax.Array, others: Sequence[jax.Array]) -> None:
        """Nothing: it goes by what stands."""

    def propose(
        self, params: Any, state: State, numbers: Numbers, choice: Choice, first: bool = False, ahead: Any = None
    ) -> tuple[Proposal, State]:
        known, size = state["cache"].lengths + 1, self.widths.most
        found = search(state["history"], known, size)
        levels = jnp.minimum(found.lengths[:, None] + jnp.arange(size)[None, :], LONGEST)
        levels = jnp.where(found.lengths[:, None] > 0, levels, 0)
        there = jnp.where(found.lengths > 0, size, 0)
        sent = jnp.where(state["table"].active, there, 0)
        count = gain.worth(gain.reaches(state["table"], levels), sent, self.widths.costs)
        return Proposal(found.tokens, levels, there, count), state
