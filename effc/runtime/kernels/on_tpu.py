"""Whether programs carry TPU kernels, and what those say of themselves while they are traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Call:
    """One call of a kernel: bytes that a grid step reads from HBM, and how many steps there are."""

    name: str
    step_bytes: float
    steps: int


_calls: ContextVar[list[Call] | None] = ContextVar("effc_tpu_calls", default=None)


@contextlib.contextmanager
def traced() -> Iterator[list[Call]]:
    """Programs traced inside carry TPU kernels, whatever machine traces them; gives the list of their calls."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def wanted() -> bool:
    """Whether programs may run on a TPU."""
    return _calls.get() is not None or jax.default_backend() == "tpu"


def note(name: str, step_bytes: float, steps: int) -> None:
    """A kernel tells of a call of it."""
    calls = _calls.get()
    if calls is not None:
        calls.append(Call(name, step_bytes, steps))
