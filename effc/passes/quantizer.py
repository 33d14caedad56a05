"""Arrays to codes and scales: round to nearest, scaled by the greatest magnitude or by least squares."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from effc.errors import EffcError
from effc.ir.types import NUMPY, Quant
from effc.runtime.qarray import pack
from effc.weights import Array, Arrays

Method = Literal["absmax", "mse"]

BLOCK = 1 << 16
"""Elements worked on at a time: a block and its temporaries stay in a core's cache."""

VANISHED = 1e-19
"""Scales below the root of the smallest f32 are as good as none."""

Block = tuple[slice, slice, slice]

GRID = (0.82, 0.87, 0.92, 0.97, 1.02, 1.07)
"""Scales tried by `mse`, as fractions of the one that just reaches the group's extreme value."""


def quantize(array: Array, quant: Quant, method: Method, where: str) -> Arrays:
    """Codes, scales and zeros of `array` as they are stored; EffcError for what cannot be coded."""
    x = np.asarray(array)
    if x.ndim != 2:
        raise EffcError(f"{where}: has {x.ndim} axes, want a matrix to quantize")
    if not x.size or not np.isfinite([np.float32(x.max()), np.float32(x.min())]).all():
        raise EffcError(f"{where}: is empty or holds NaN or infinity, want finite weights to quantize")
    grouped = _grouped(x, quant)
    codes = np.empty(_whole(x.shape, quant), np.int8)
    coded = _grouped(codes, quant)  # a view: what is written there is in `codes`
    scales = np.empty((grouped.shape[0], 1, grouped.shape[2]), np.float32)
    zeros = np.zeros_like(scales)

    def work(block: Block) -> None:
        here = np.ascontiguousarray(grouped[block], np.float32)
        coded[block], scales[block], zeros[block] = _block(here, quant, method)

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, _blocks(grouped.shape)))
    if not np.isfinite(scales.astype(NUMPY[quant.scale])).all():
        raise EffcError(f"{where}: weights too large for {quant.scale} scales, want scale=f32")
    return _stored(codes, scales, zeros, quant, x.shape)


def _whole(shape: tuple[int, ...], quant: Quant) -> tuple[int, ...]:
    """`shape` with the coded axis filled up to whole groups."""
    out, group = list(shape), quant.group or shape[quant.axis]
    out[quant.axis] = -(-shape[quant.axis] // group) * group
    return tuple(out)


def _grouped(x: Array, quant: Quant) -> Array:
    """[groups, codes in a group, the rest] as a view; a copy, zeros at its end, where groups leave a rest."""
    whole = _whole(x.shape, quant)
    if whole != x.shape:
        x = np.pad(x, [(0, size - was) for size, was in zip(whole, x.shape, strict=True)])
    moved = np.moveaxis(x, quant.axis, 0).reshape(whole[quant.axis], -1)
    return moved.reshape(-1, quant.group or whole[quant.axis], moved.shape[1])


def _blocks(shape: tuple[int, ...]) -> Iterator[Block]:
    """Cuts of groups and of the rest, each of about `BLOCK` elements."""
    groups, group, rest = shape
    wide = max(1, min(rest, BLOCK // group))
    many = max(1, BLOCK // (group * wide))
    for start in range(0, groups, many):
        for left in range(0, rest, wide):
            yield slice(start, start + many), slice(None), slice(left, left + wide)


def _block(x: Array, quant: Quant, method: Method) -> tuple[Array, Array, Array]:
    """Codes, scales and zero points of groups [G, g, rest], reduced over g."""
    if not quant.sym:
        return _asymmetric(x, quant)
    if method == "mse":
        return (*_least_squares(x, quant), np.zeros(1, np.float32))
    return (*_absmax(x, quant), np.zeros(1, np.float32))


def _limits(quant: Quant) -> tuple[int, int]:
    return -(1 << quant.bits - 1), (1 << quant.bits - 1) - 1


def _rounded(scale: Array, quant: Quant) -> Array:
    """The scale as stored, back in f32; 1 where it vanished or nearly did, so that dividing is safe."""
    with np.errstate(over="ignore"):
        kept = scale.astype(NUMPY[quant.scale]).astype(np.float32)
    kept[np.abs(kept) < VANISHED] = 1
    return kept


def nearest_codes(x: Array, scale: Array, quant: Quant) -> Array:
    """Nearest codes, in f32."""
    low, high = _limits(quant)
    codes = x / scale
    np.rint(codes, out=codes)
    return np.clip(codes, low, high, out=codes)


def _absmax(x: Array, quant: Quant) -> tuple[Array, Array]:
    """The greatest magnitude at half a step past the last code: no error exceeds half a step."""
    scale = _rounded(np.abs(x).max(1, keepdims=True) / (_limits(quant)[1] + 0.5), quant)
    return nearest_codes(x, scale, quant), scale


def _asymmetric(x: Array, quant: Quant) -> tuple[Array, Array, Array]:
    low, high = _limits(quant)
    least, most = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = _rounded((most - least) / (high - low), quant)
    zero = np.clip(np.rint(low - least / scale), low, high)
    return np.clip(np.rint(x / scale) + zero, low, high), scale, zero


def _least_squares(x: Array, quant: Quant) -> tuple[Array, Array]:
    """Of a grid of scales that of least squared error; the extreme value is on the side with more codes."""
    best, scale = _absmax(x, quant)
    error = _error(x, best, scale)
    extreme = np.where(
        x.max(1, keepdims=True) > -x.min(1, keepdims=True), x.max(1, keepdims=True), x.min(1, keepdims=True)
    )
    for fraction in GRID:
        tried = _rounded(extreme * (fraction / _limits(quant)[0]), quant)
        codes = nearest_codes(x, tried, quant)
        tried = _rounded(_fit(x, codes, tried), quant)
        wrong = _error(x, codes, tried)
        better = wrong < error
        np.copyto(best, codes, where=better)
        np.copyto(scale, tried, where=better)
        np.copyto(error, wrong, where=better)
    return best, scale


def _fit(x: Array, codes: Array, scale: Array) -> Array:
    """The scale that fits these codes best: x.q / q.q."""
    square = np.einsum("gkn,gkn->gn", codes, codes)[:, None]
    return np.where(square > 0, np.einsum("gkn,gkn->gn", x, codes)[:, None] / np.maximum(square, 1), scale)


def _error(x: Array, codes: Array, scale: Array) -> Array:
    wrong = codes * scale
    wrong -= x
    return np.einsum("gkn,gkn->gn", wrong, wrong)[:, None]


def _stored(codes: Array, scales: Array, zeros: Array, quant: Quant, shape: tuple[int, ...]) -> Arrays:
    """Cut to the parameter's own shape, packed."""
    axis = quant.axis % len(shape)
    rest = (*shape[:axis], *shape[axis + 1 :])
    cut = np.take(codes, range(shape[axis]), axis) if codes.shape != shape else codes

    def small(values: Array) -> Array:
        moved = np.moveaxis(values.reshape(-1, *rest), 0, axis)
        return np.ascontiguousarray(moved.astype(NUMPY[quant.scale]))

    stored = pack(cut) if quant.bits <= 4 else cut
    return {"codes": stored, "scales": small(scales)} | ({} if quant.sym else {"zeros": small(zeros)})
