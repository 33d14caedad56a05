"""What the process holds, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys

import jax


def peak_bytes() -> int:
    """The most memory this process held, or any it started and waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whose) * unit


def give_back() -> None:
    """Drop compiled programs of the step before, and return freed memory to the system where the C library can."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others return memory by themselves
        if trim is not None:
            trim(0)
