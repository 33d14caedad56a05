"""How fast this machine's processors read memory: the limit of decoding one token at a time."""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from effc.runtime.kernels.region import native

LEAST = 64 << 20
"""Bytes to read at least: caches must not hold them."""


def bandwidth(size: int, threads: int | None = None, repeats: int = 3) -> float | None:
    """Bytes a second read by all threads together, the best of some tries; None without native code."""
    if not native.usable():
        return None
    read = native.library().EffcStream
    read.restype = ctypes.c_int64
    count = threads or len(os.sched_getaffinity(0))
    each = max(size, LEAST) // count // 256 * 256
    memory = np.ones(each * count, np.uint8)
    parts = [(ctypes.c_void_p(memory.ctypes.data + i * each), ctypes.c_int64(each)) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        times = [_timed(lambda: list(pool.map(lambda part: read(*part), parts))) for _ in range(repeats + 1)]
    return each * count / min(times[1:])


def _timed(call: object) -> float:
    assert callable(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
