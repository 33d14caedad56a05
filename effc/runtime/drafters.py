"""What an emitted program's `DECODE` asks for: the drafter, its widths, and the state that its loop starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.errors import EffcError, nearest
from effc.runtime import gain, lookup
from effc.runtime.drafting import Choice, Drafter, Loop, Proposal, State, Widths, empty_tally, widths
from effc.runtime.lookup import Lookup
from effc.runtime.program import Program
from effc.runtime.speculate import NONE, check_rolls_back

SLOPE = 0.1
"""Cost of one more token in a call, in calls on one, where none was measured."""

MARGIN = 2
"""Rows of a history past the last token and the drafts after it."""


@dataclass(frozen=True)
class Speculation:
    """A program's drafter: what its loop and its first state are made of."""

    program: Program
    drafter: Drafter
    widths: Widths
    prior: tuple[float, ...]
    verify: Callable[..., Any]

    def loop(self, choice: Choice) -> Loop:
        """The loop to compile for this way of choosing."""
        return Loop(self.verify, self.drafter, self.widths, self.program.context, choice)

    def begin(self, state: State, prompts: Sequence[Sequence[int]], new: int, *, draws: bool) -> State:
        """The state after the first token, with what speculation keeps beside; up to `new` tokens a row in all."""
        check_rolls_back(state["cache"])
        rows, most = len(prompts), self.widths.most
        room = max(map(len, prompts)) + new + most + MARGIN
        left = jnp.full(rows, new - 1, jnp.int32)
        nothing = jnp.zeros((rows, most), jnp.int32)
        history = _history(prompts, room).at[jnp.arange(rows), state["cache"].lengths].set(state["token"])
        own = {
            "history": history, "left": left, "table": gain.begin(rows, self.prior),
            "tally": empty_tally(self.widths), "proposal": Proposal(nothing, nothing, left * 0),
        }  # fmt: skip
        return {**state, **jax.tree.map(jnp.copy, own)}  # no array twice: they are donated


def speculation_of(program: Program) -> Speculation | None:
    """What `DECODE` says; None where decoding is plain."""
    asked = program.decode
    if asked.get("strategy") != "speculative":
        return None
    kind = str(asked.get("kind"))
    if kind not in KINDS:
        raise EffcError(f"decode: no drafter '{kind}', want {' or '.join(KINDS)}{nearest(kind, KINDS)}")
    return KINDS[kind](program, asked)


def _lookup(program: Program, asked: Mapping[str, Any]) -> Speculation:
    sizes = _widths(asked)
    prior = tuple(asked.get("acceptance", lookup.PRIOR))
    return Speculation(program, Lookup(sizes), sizes, prior, program.extend)


KINDS: Mapping[str, Callable[[Program, Mapping[str, Any]], Speculation]] = {"lookup": _lookup}


def _widths(asked: Mapping[str, Any]) -> Widths:
    gamma = int(asked["gamma"])
    curve = asked.get("verify") or [1 + SLOPE * n for n in range(gamma + 1)]
    return widths(gamma, curve)


def _history(prompts: Sequence[Sequence[int]], room: int) -> jax.Array:
    """i32[b,room]: the prompts, nothing after them."""
    out = np.full((len(prompts), room), NONE, np.int32)
    for row, prompt in enumerate(prompts):
        out[row, : len(prompt)] = prompt
    return jnp.asarray(out)
