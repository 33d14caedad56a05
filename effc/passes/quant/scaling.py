"""Which scale each channel gets at a site: rounding hurts least (AWQ), or outliers shrink (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from effc.passes.quant.statistics import Seen
from effc.weights import Array

STEPS = 20
"""Exponents tried by AWQ, from 0 (no scale) to 1."""

Rounds = Callable[[Array, Array], Array]
"""What a matrix w[K,N] becomes when it is coded, by its inputs' importance f32[K]."""


def awq(seen: Seen, matrices: Sequence[tuple[Array, Rounds]], index: Array) -> tuple[Array, float]:
    """s and the exponent a for which the readers' outputs change least, each as a share of its own size.

    s = mean|x|^a, or mean|x|^a / size^(1-a) where size is how large a channel's weights are in the matrices (their
    columns brought to one size); ones where none of them helps.
    """
    mean = tied(np.maximum(seen.mean.astype(np.float64), 1e-12), index)
    size = tied(np.maximum(_sizes([w for w, _ in matrices]), 1e-12), index)
    whole = [max(output_error(w, seen.square), 1e-30) for w, _ in matrices]
    best, scale, exponent = np.inf, np.ones_like(mean), 0.0
    for a, made in _tried(mean, size):
        changes = (_error(seen, w, rounds, made[index]) for w, rounds in matrices)
        wrong = sum(change / total for change, total in zip(changes, whole, strict=True))
        if wrong < best:
            best, scale, exponent = wrong, made, a
    return scale, exponent


def _tried(mean: Array, size: Array) -> Iterator[tuple[float, Array]]:
    """Exponents and scales, no scale first."""
    for a in (step / STEPS for step in range(STEPS)):
        yield a, balanced(mean**a)
    for a in (step / STEPS for step in range(1, STEPS)):
        yield a, balanced(mean**a / size ** (1 - a))


def _sizes(matrices: Sequence[Array]) -> Array:
    """Mean |w| of each row, in matrices whose columns reach 1."""
    return np.mean([(np.abs(w) / np.maximum(np.abs(w).max(0), 1e-12)).mean(1) for w in matrices], axis=0, dtype=float)


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
