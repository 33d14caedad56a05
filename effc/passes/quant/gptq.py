"""GPTQ: rows of a matrix are rounded one after the other, and what rounding took is made up for by those after it.

For y = x w with w[K,N] and H = x'x, the error (w - w')' H (w - w') is kept small: with H^-1 = U'U, U upper
triangular, row k is rounded, and (w_k - w'_k) U_kj / U_kk is taken from every row j > k. The scales of a group
are found when its first row is reached, from the rows as they are then.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_triangular

from effc.ir.types import Quant
from effc.passes.quantizer import Method, group_codes, level_dtype
from effc.runtime import forms
from effc.weights import Array

DAMP = 0.01
"""Of the mean of H's diagonal, added to it: H of few tokens has no inverse."""

BLOCK = 128
"""Rows after which the rest of the matrix is brought up to date."""

COLUMNS = 1 << 25
"""Elements worked on at a time."""

WIDEST = 8192
"""Rows that are seen together; wider matrices are taken in parts, as if these had nothing to do with each other."""


def gptq(w: Array, square: Array, quant: Quant, method: Method, *, ordered: bool = False) -> tuple[Array, Array, Array]:
    """Codes [K,N], scales and zeros [groups,1,N] of w[K,N]; `ordered`: the rows that see most come first."""
    step = _together(len(w), quant)
    parts = [_part(w[i : i + step], square[i : i + step, i : i + step], quant, method, ordered)
             for i in range(0, len(w), step)]  # fmt: skip
    codes, scales, zeros = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return codes, scales, zeros


def _together(rows: int, quant: Quant) -> int:
    """Whole groups of at most WIDEST rows; all rows where they share a scale."""
    return rows if rows <= WIDEST or not quant.group else max(1, WIDEST // quant.group) * quant.group


def _part(w: Array, square: Array, quant: Quant, method: Method, ordered: bool) -> tuple[Array, Array, Array]:
    order = np.argsort(-np.diagonal(square), kind="stable") if ordered else np.arange(len(w))
    upper = inverse_root(square[np.ix_(order, order)])
    # An error in row k costs its square times this: what later rows make up for is taken off already.
    importance = np.empty(len(w), np.float32)
    importance[order] = 1 / np.square(np.diagonal(upper))
    wide = max(1, COLUMNS // len(w))
    done = [_columns(w[:, i : i + wide], upper, order, importance, quant, method, ordered)
            for i in range(0, w.shape[1], wide)]  # fmt: skip
    codes, scales, zeros = (np.concatenate(parts, axis=-1) for parts in zip(*done, strict=True))
    return codes, scales, zeros


def _columns(
    w: Array, upper: Array, order: Array, importance: Array, quant: Quant, method: Method, ordered: bool
) -> tuple[Array, Array, Array]:
    """Columns have nothing to do with each other; a few at a time take less memory."""
    scales = _Scales(np.array(w, np.float32), quant, method, importance)
    return _rounded(scales.w, upper, order, scales, ordered), scales.scale, scales.zero


def inverse_root(square: Array) -> Array:
    """U f32[K,K], upper triangular, of (H + damping)^-1 = U'U; inputs that are always 0 stand apart."""
    h = np.array(square, np.float64)
    diagonal = np.einsum("ii->i", h)
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean or 1.0
    diagonal += DAMP * (mean or 1.0)
    # H = R R' with R upper triangular is the Cholesky factor of H turned round; then U = R^-1.
    root = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(root, np.eye(len(h))).astype(np.float32)


class _Scales:
    """Scale and zero point of every group, found when its first row is rounded."""

    def __init__(self, w: Array, quant: Quant, method: Method, importance: Array):
        self.w, self.quant, self.importance = w, quant, importance
        self.method: Method = method
        self.group = quant.group or len(w)
        groups = -(-len(w) // self.group)
        self.scale = np.zeros((groups, 1, w.shape[1]), np.float32)
        self.zero = np.zeros_like(self.scale)
        self.found = np.zeros(groups, bool)

    def find(self, group: int) -> None:
        """From the rows as they are."""
        rows = slice(group * self.group, (group + 1) * self.group)
        x, importance = self.w[rows][None], self.importance[rows][None, :, None]
        _, scale, zero = group_codes(np.ascontiguousarray(x), self.quant, self.method, importance)
        self.scale[group], self.zero[group], self.found[group] = scale[0], zero[0], True

    def of(self, row: int) -> tuple[Array, Array]:
        """For one row of codes."""
        group = row // self.group
        if not self.found[group]:
            self.find(group)
        return self.scale[group, 0], self.zero[group, 0]


def _rounded(w: Array, upper: Array, order: Array, scales: _Scales, ordered: bool) -> Array:
    """Codes; `w` is changed on the way. Groups whose rows are taken out of turn have their scales beforehand."""
    for group in range(len(scales.found)) if ordered else ():
        scales.find(group)
    codes = np.empty(w.shape, level_dtype(scales.quant))
    step = _step(scales.group, len(w))
    for start in range(0, len(w), step):
        stop = min(start + step, len(w))
        wrong = np.empty((stop - start, w.shape[1]), np.float32)
        here = w[order[start:stop]]
        for i, row in enumerate(order[start:stop]):
            if not ordered and row % scales.group == 0:
                w[order[start:stop]] = here
            scale, zero = scales.of(row)
            code = forms.nearest(here[i] / scale + zero, scales.quant.form, scales.quant.bits)
            codes[row] = code
            wrong[i] = (here[i] - (code - zero) * scale) / upper[start + i, start + i]
            here[i + 1 :] -= upper[start + i, start + i + 1 : stop, None] * wrong[i]
        w[order[stop:]] -= upper[start:stop, stop:].T @ wrong
    return codes


def _step(group: int, rows: int) -> int:
    """Rows a block: whole groups, so that a group's rows are up to date when its scale is found."""
    if group <= BLOCK:
        return BLOCK // group * group
    return group if group <= 4 * BLOCK and group < rows else BLOCK
