"""Whether native kernels are wanted: EFFC_NATIVE=0 keeps everything on XLA, and so does `portable`."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import jax

from effc.runtime.kernels.build import Unbuilt

_lock = threading.RLock()

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


def usable(target: Callable[[], str]) -> bool:
    """Whether programs traced now call what `target` builds; the first time that it cannot be built, says why."""
    if avoided():
        return False
    with _lock:
        return not (why := _failure(target)) or _told(why)


@cache
def _failure(target: Callable[[], str]) -> str:
    try:
        target()
    except Unbuilt as error:
        return str(error)
    return ""


@cache
def _told(why: str) -> bool:
    """False; the same reason is told once, whichever kernel it stops."""
    print(f"effc: products run through XLA, slower: {why}", file=sys.stderr)
    return False


def status(target: Callable[[], str], built: Callable[[], str]) -> str:
    """What programs use on this machine, and why; `built` words it where there is a kernel."""
    if off():
        return "off (EFFC_NATIVE=0)"
    if jax.default_backend() != "cpu":
        return f"not used on {jax.default_backend()}"
    try:
        target()
    except Unbuilt as error:
        return f"not built: {error}"
    return built()
