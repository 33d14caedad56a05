"""Whether native kernels are wanted: EFFC_NATIVE=0 keeps everything on XLA, and so does `portable`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_portable: ContextVar[bool] = ContextVar("portable", default=False)


@contextmanager
def portable() -> Iterator[None]:
    """Programs traced inside are of XLA's own ops: any machine with JAX can run them."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def off() -> bool:
    """Whether the user wants none of it."""
    return os.environ.get("EFFC_NATIVE") == "0"


def avoided() -> bool:
    """Whether programs traced now do without."""
    return _portable.get() or off() or jax.default_backend() != "cpu"
