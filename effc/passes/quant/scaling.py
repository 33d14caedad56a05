"""Which scale each channel gets at a site: rounding hurts least (AWQ), or outliers shrink (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from effc.passes.quant.statistics import Seen
from effc.weights import Array

STEPS = 20
"""Exponents tried by AWQ, from 0 (no scale) to 1."""

Rounds = Callable[[Array, Array], Array]
"""What a matrix w[K,N] becomes when it is coded, by its inputs' importance f32[K]."""


def awq(seen: Seen, matrices: Sequence[tuple[Array, Rounds]], index: Array) -> tuple[Array, float]:
    """s and the exponent a, s = mean|x|^a, for which the readers' outputs change least; ones where none helps."""
    mean = tied(np.maximum(seen.mean.astype(np.float64), 1e-12), index)
    best, scale, exponent = np.inf, np.ones_like(mean), 0.0
    for step in range(STEPS):
        tried = balanced(mean ** (step / STEPS))
        wrong = sum(_error(seen, w, rounds, tried[index]) for w, rounds in matrices)
        if wrong < best:
            best, scale, exponent = wrong, tried, step / STEPS
    return scale, exponent


def smooth(seen: Seen, matrices: Sequence[Array], index: Array, alpha: float) -> Array:
    """s = max|x|^alpha / max|w|^(1-alpha), of each channel."""
    rows = np.max([np.abs(w).max(1) for w in matrices], axis=0)
    peak, most = (np.maximum(tied_most(x.astype(np.float64), index), 1e-5) for x in (seen.peak, rows))
    return balanced(peak**alpha / most ** (1 - alpha))


def tied(values: Array, index: Array) -> Array:
    """Means of the channels that come from one channel of the source."""
    count = np.bincount(index)
    return np.bincount(index, values) / np.maximum(count, 1)


def tied_most(values: Array, index: Array) -> Array:
    """The greatest instead."""
    out = np.zeros(int(index.max()) + 1)
    np.maximum.at(out, index, values)
    return out


def balanced(scale: Array) -> Array:
    """Greatest times least is one: neither side gets all of it."""
    return scale / np.sqrt(scale.max() * scale.min())


def _error(seen: Seen, w: Array, rounds: Rounds, scale: Array) -> float:
    s = scale.astype(np.float32)[:, None]
    importance = np.diagonal(seen.square) / np.square(s[:, 0])
    return output_error(rounds(w * s, importance) / s - w, seen.square)


def output_error(wrong: Array, square: Array) -> float:
    """Squared change of the outputs x @ w over the text, for a change of w[K,N]."""
    return float(np.einsum("kn,kn->", square @ wrong, wrong, optimize=False))
