"""What a process of ours needs before anything else: memory-saving code generation, clean ends."""

from __future__ import annotations

import os
import signal
import sys
from importlib import metadata
from types import FrameType
from typing import NoReturn

from effc.backend.tpu.absent import quiet

SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""XLA's CPU scheduler otherwise keeps dequantized matrices of many layers at once: 1.8 times the memory."""

KNOWN_BEFORE = (0, 13)
"""jax releases that take the flag; an unknown flag would end the process."""


def prepare() -> None:
    """Set up this process and those it starts; JAX must not have been imported yet."""
    signal.signal(signal.SIGTERM, _interrupted)
    for name, value in quiet().items():
        os.environ.setdefault(name, value)
    release = tuple(int(part) for part in metadata.version("jax").split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", "")
    if release < KNOWN_BEFORE and "jax" not in sys.modules and SCHEDULER.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {SCHEDULER}".strip()


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """A polite kill ends as Ctrl-C does: what is half-written goes."""
    raise KeyboardInterrupt
