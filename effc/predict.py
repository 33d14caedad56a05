"""What a run is likely to take: speed from bytes and ops, memory, time. Rough, and held against what was.

A token costs the reading of its weights and keys at the speed of memory, measured here by all threads together, and
a little for every op: less where layers run as native regions, which of coded weights also unpack what they read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from effc.ir.analysis import cache_bytes_per_token, flops_per_token, param_count, runs
from effc.ir.core import Module
from effc.ir.types import Quant
from effc.plan import token_bytes
from effc.report import Report, size
from effc.runtime.kernels.region import native
from effc.runtime.kernels.region.bandwidth import bandwidth as streamed
from effc.speed import LIBRARIES
from effc.weights import nbytes

PROBE_BYTES = 64 << 20
"""Larger than caches."""

OP_SECONDS, NATIVE_OP_SECONDS = 2.1e-6, 5e-7
"""For every op of a decoded token beside its bytes: XLA's, and one in a native region (measured: 240 and 600 ops)."""

UNPACKED = 0.75
"""Share of the memory's speed at which coded weights are read (measured: SmolLM2 in 4 bits)."""

FLOPS = 2e10
"""Arithmetic a second while checking and evaluating, compiling counted in."""

STARTING, PREPARING = 22.0, 12.0
"""Seconds of tracing, compiling and checking that do not depend on the weights; of compiling for each training and
each calibration."""

CALIBRATION = 200 * 32 * 3
"""Tokens that a pass generates to calibrate: prompts, tokens of each, and how often on average."""

TRAINER = 500 * 10**6
"""Memory of what training brings: its libraries, its compiled step (measured: 1.2 GB in all for 6 M weights)."""

COPIES = 6
"""Of the weights in f32 while training: teacher, student, gradient, two of the optimizer, one on its way."""

SEQUENCES, LOGITS = 1024, 6
"""Tokens of a training step, and how often their logits are held."""

PASSES, TRAINED = 4, 0.8
"""How often a training step does a forward's arithmetic (teacher's, student's and twice that for gradients), and the
share of a product's speed at which it does so."""

PROBE = 1024
"""Rows and columns of the product that is timed."""


@dataclass(frozen=True)
class Decoding:
    """What a decoded token costs: bytes read at so many a second, and ops of so many seconds each."""

    nbytes: int
    bandwidth: float
    ops: int
    each: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return 1 / (self.nbytes / self.bandwidth + self.ops * self.each)

    def __str__(self) -> str:
        return f"{size(self.nbytes)} at {self.bandwidth / 1e9:.1f} GB/s and {self.ops} ops of {self.each * 1e6:.1f} us"


@dataclass(frozen=True)
class Prediction:
    """tokens a second of one sequence, decoding; seconds of the whole run, training among them."""

    nbytes: int
    token_bytes: int
    decode: float
    peak_bytes: int
    seconds: float
    training: float
    how: str = ""
    """What tokens a second follow from."""

    def lines(self) -> list[str]:
        """For the terminal."""
        trains = f", {self.training / 60:.3g} min of them training" if self.training else ""
        return [
            f"decode: about {self.decode:.0f} tokens/s here" + (f": a token is {self.how}" if self.how else ""),
            f"peak memory: about {size(self.peak_bytes)}",
            f"time: about {self.seconds / 60:.2g} min{trains}",
        ]

    def json(self) -> dict[str, Any]:
        """Every number by name."""
        return asdict(self)

    def beside(self, report: Report, seconds: float) -> str:
        """One line: what was predicted and what was."""
        speed = report.after.speed
        pairs = [
            ("weights", size(self.nbytes), size(report.after.nbytes)),
            ("a token reads", size(self.token_bytes), size(report.after.token_bytes)),
            ("decode", f"{self.decode:.0f} tokens/s", f"{speed.decode:.0f}" if speed else "not measured"),
            ("peak memory", size(self.peak_bytes), size(report.peak_bytes)),
            ("time", f"{self.seconds:.0f} s", f"{seconds:.0f} s"),
        ]
        return "planned (and what it was): " + ", ".join(f"{what} {told} ({was})" for what, told, was in pairs)


def predict(
    before: Module, after: Module, minutes: Mapping[str, float], scored: int, calibrating: int = 0
) -> Prediction:
    """From structure alone; minutes of training by pass, scored tokens of the evaluation, passes that calibrate."""
    training = 60 * sum(minutes.values())
    work = 2 * scored * (flops_per_token(before, 256) + flops_per_token(after, 256)) / FLOPS
    peak = LIBRARIES + 2 * max(nbytes(before), nbytes(after))
    if training:
        peak = max(
            peak, LIBRARIES + TRAINER + 4 * COPIES * param_count(before) + 4 * LOGITS * SEQUENCES * _vocab(before)
        )
    written = 3 * nbytes(before) / bandwidth()
    prepared, token = STARTING + PREPARING * (sum(map(bool, minutes.values())) + calibrating), decoding(after)
    seconds = prepared + work + written + training + CALIBRATION * calibrating / token.rate
    return Prediction(nbytes(after), token_bytes(after), token.rate, peak, seconds, training, str(token))


def decoding(module: Module, context: int = 128) -> Decoding:
    """Of one sequence that holds `context` tokens."""
    read = int(token_bytes(module) + context * cache_bytes_per_token(module))
    ops = int(sum(times * len(module.funcs[name].ops) for name, times in runs(module).items()))
    coded, floats = _kinds(module)
    if not (coded or floats) or not native.usable():
        return Decoding(read, bandwidth(), ops, OP_SECONDS)
    return Decoding(read, UNPACKED * bandwidth() if coded else bandwidth(), ops, NATIVE_OP_SECONDS)


def _kinds(module: Module) -> tuple[bool, bool]:
    """Whether most of its layers' weights are coded, and whether most are f32: native regions take both."""
    dtypes = [p.type.dtype for p in module.params.values() if p.stack and len(p.type.shape) > 1]
    coded, floats = sum(isinstance(d, Quant) for d in dtypes), sum(d == "f32" for d in dtypes)
    return 2 * coded > len(dtypes), 2 * floats > len(dtypes)


def step_seconds(module: Module) -> float:
    """Of one training step of a model like this."""
    return SEQUENCES * PASSES * flops_per_token(module, 256) / (TRAINED * arithmetic())


def _vocab(module: Module) -> int:
    size = module.forward().result_types()[0].shape[-1]
    return size if isinstance(size, int) else 0


@cache
def bandwidth() -> float:
    """Bytes a second that this machine reads, by all threads; without native code the best of some copies."""
    return streamed(PROBE_BYTES) or _copying()


@cache
def arithmetic() -> float:
    """f32 operations a second of this machine, in a product by all threads: the best of some."""
    square = np.ones((PROBE, PROBE), np.float32)
    return 2 * PROBE**3 / min(_product(square) for _ in range(5))


def _product(square: np.ndarray) -> float:
    start = time.perf_counter()
    np.matmul(square, square)
    return time.perf_counter() - start


def _copying() -> float:
    array = np.ones(PROBE_BYTES // 4, np.float32)
    other = np.empty_like(array)
    return max(_copied(array, other) for _ in range(3))


def _copied(array: np.ndarray, other: np.ndarray) -> float:
    start = time.perf_counter()
    np.copyto(other, array)
    return 2 * array.nbytes / (time.perf_counter() - start)
