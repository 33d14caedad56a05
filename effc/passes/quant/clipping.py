"""Scales of groups for rounded codes, searched by what they do to the outputs of the whole matrix.

For y = x w with w[K,N] and H = x'x, the error of w counts (w - w')' H (w - w'). Groups are gone through one after the
other: of several cuts of its extremes, each with the scale that fits its codes best, a group takes the one of least
error beside what the other groups have wrong by now. It is never worse than where it begins.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from effc.ir.types import Quant
from effc.passes.quantizer import Method, code, kept_scale, level_dtype, limits, spread
from effc.runtime import forms
from effc.weights import Array

CUTS = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1)
"""Scales tried, as fractions of the one it begins with."""


def clipped(w: Array, square: Array, quant: Quant, method: Method) -> tuple[Array, Array, Array]:
    """Codes [K,N], scales and zeros [groups,1,N] of w[K,N]; quant.axis is -2."""
    codes, scales, zeros = code(w, quant, method, np.diagonal(square).copy())
    levels = np.array(codes, np.float32)
    wrong, size = spread(levels, scales, zeros, quant.group) - w, quant.group or len(w)
    for group in range(len(scales)):
        rows = slice(group * size, (group + 1) * size)
        own = square[rows, rows]
        others = square[rows] @ wrong - own @ wrong[rows]
        start = levels[rows], scales[group], zeros[group]
        levels[rows], scales[group] = _searched(w[rows], own, others, start, quant)
        wrong[rows] = (levels[rows] - zeros[group]) * scales[group] - w[rows]
    return levels.astype(level_dtype(quant)), scales, zeros


def _searched(
    x: Array, own: Array, others: Array, start: tuple[Array, Array, Array], quant: Quant
) -> tuple[Array, Array]:
    """Codes [g,N] and scales [1,N] of one group; `others` is H times what the other groups have wrong."""
    seen, zero = own @ x, start[2]
    best, scale = start[0].copy(), start[1].copy()
    least = _cost(x, best - zero, scale, own @ (best - zero), seen, others)
    for tried, made_by in _tried(x, own, seen - others, start, quant):
        levels, through = tried
        cost = _cost(x, levels, made_by, through, seen, others)
        better = cost < least
        for kept, new in ((best, levels + zero), (scale, made_by), (least, cost)):
            np.copyto(kept, new, where=better)
    return best, scale


def _tried(
    x: Array, own: Array, wanted: Array, start: tuple[Array, Array, Array], quant: Quant
) -> Iterator[tuple[tuple[Array, Array], Array]]:
    """Codes less zero points, H times them, and the scale that fits them best: q'(wanted) / q'Hq."""
    _, scale, zero = start
    low, high = limits(quant)
    for cut in CUTS:
        near = kept_scale(scale * np.float32(cut), quant)
        levels = np.clip(forms.nearest(x / near + zero, quant.form, quant.bits), low, high) - zero
        through = own @ levels
        size, fits = (levels * through).sum(0), (levels * wanted).sum(0)
        fitted = np.where(size > 0, fits / np.where(size > 0, size, 1), near[0])
        yield (levels, through), kept_scale(fitted[None].astype(np.float32), quant)


def _cost(x: Array, levels: Array, scale: Array, through: Array, seen: Array, others: Array) -> Array:
    """[1,N]: e'He + 2 e'(what the others have wrong), e = levels * scale - x; `through` is H levels, `seen` is Hx."""
    return ((levels * scale - x) * (scale * through - seen + 2 * others)).sum(0, keepdims=True)
