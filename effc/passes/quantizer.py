"""Arrays to codes and scales: round to nearest, scaled by the greatest magnitude, a percentile, or least squares.

`importance` f32[K], where given, is what an error in each place along the coded axis counts (least squares alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from effc.errors import EffcError
from effc.ir.types import NUMPY, Quant
from effc.runtime import forms
from effc.runtime.forms import pack
from effc.weights import Array, Arrays

Method = Literal["absmax", "mse", "percentile"]

PERCENTILE = 99.9
"""Share of magnitudes, in percent, that `percentile` reaches; the others are cut."""

BLOCK = 1 << 16
"""Elements worked on at a time: a block and its temporaries stay in a core's cache."""

VANISHED = 1e-19
"""Scales below the root of the smallest f32 are as good as none."""

POWERS = "f8e8m0"
"""The dtype of scales that are powers of two."""

POWERS_GRID = (0.6, 0.85, 1.2, 1.7)
"""As GRID: few enough to try those on both sides."""

Block = tuple[slice, slice, slice]

GRID = (0.82, 0.87, 0.92, 0.97, 1.02, 1.07)
"""Scales tried by `mse`, as fractions of the one that just reaches the group's extreme value."""

SHRUNK = (1.0, 0.92, 0.85, 0.78, 0.7)
"""Ranges tried by `mse` with zero points, as fractions of the whole."""


def quantize(
    array: Array, quant: Quant, method: Method, where: str, importance: Array | None = None,
    off: Callable[[float], object] | None = None,
) -> Arrays:  # fmt: skip
    """Codes, scales and zeros of `array` as they are stored; EffcError for what cannot be coded.

    `off` is told the error: the norm of what rounding changed, as a share of the array's own.
    """
    x = checked(array, where)
    wrong: list[tuple[float, float]] | None = [] if off else None
    made = stored(*_coded(x, quant, method, importance, wrong), quant, x.shape, where)
    if off and wrong:
        lost, whole = np.sum(wrong, 0)
        off(float(np.sqrt(lost / max(whole, 1e-30))))
    return made


def rounded(x: Array, quant: Quant, method: Method, importance: Array | None = None) -> Array:
    """What the codes of x[K,N] stand for, f32; quant.axis is -2."""
    codes, scales, zeros = code(x, quant, method, importance)
    return spread(codes, scales, zeros, quant.group)


def code(x: Array, quant: Quant, method: Method, importance: Array | None = None) -> tuple[Array, Array, Array]:
    """Codes [K,N], scales and zeros [groups,1,N] of x[K,N]; quant.axis is -2."""
    codes, scales, zeros = _coded(x, quant, method, importance)
    return codes[: len(x)], scales, zeros


def spread(codes: Array, scales: Array, zeros: Array, group: int) -> Array:
    """f32 values of codes [K,N], scales and zeros [groups,1,N]."""
    each = group or len(codes)
    scale, zero = (np.repeat(values[:, 0], each, 0)[: len(codes)] for values in (scales, zeros))
    return (codes - zero) * scale


def _coded(
    x: Array, quant: Quant, method: Method, importance: Array | None, wrong: list[tuple[float, float]] | None = None
) -> tuple[Array, Array, Array]:
    """Codes, filled up to whole groups; scales and zeros [groups,1,the rest]; to `wrong` squares lost, and of all."""
    grouped = _grouped(x, quant)
    codes = np.empty(_whole(x.shape, quant), level_dtype(quant))
    coded = _grouped(codes, quant)  # a view: what is written there is in `codes`
    scales = np.empty((grouped.shape[0], 1, grouped.shape[2]), np.float32)
    zeros, weight = np.zeros_like(scales), _weights(importance, grouped.shape)

    def work(block: Block) -> None:
        here = np.ascontiguousarray(grouped[block], np.float32)
        mine = None if weight is None else weight[block[0]]
        coded[block], scales[block], zeros[block] = found = group_codes(here, quant, method, mine)
        if wrong is not None:
            levels, scale, zero = found
            off = (levels - zero) * scale - here
            wrong.append((float(np.vdot(off, off)), float(np.vdot(here, here))))

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, _blocks(grouped.shape)))
    return codes, scales, zeros


def checked(array: Array, where: str) -> Array:
    """The array, where it is a matrix of finite numbers; EffcError otherwise."""
    x = np.asarray(array)
    if x.ndim != 2:
        raise EffcError(f"{where}: has {x.ndim} axes, want a matrix to quantize")
    if not x.size or not np.isfinite([np.float32(x.max()), np.float32(x.min())]).all():
        raise EffcError(f"{where}: is empty or holds NaN or infinity, want finite weights to quantize")
    return x


def _weights(importance: Array | None, shape: tuple[int, ...]) -> Array | None:
    """[groups, codes in a group, 1]; what fills the last group counts nothing."""
    if importance is None:
        return None
    whole = np.zeros(shape[0] * shape[1], np.float32)
    whole[: len(importance)] = importance
    return whole.reshape(shape[0], shape[1], 1)


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


def group_codes(x: Array, quant: Quant, method: Method, weight: Array | None = None) -> tuple[Array, Array, Array]:
    """Codes, scales and zero points of groups [G, g, rest], reduced over g; weight [G, g, 1]."""
    if not quant.sym:
        return _asymmetric_search(x, quant, weight) if method == "mse" else _asymmetric(x, quant, 1.0)
    if method == "mse":
        return (*_least_squares(x, quant, weight), np.zeros(1, np.float32))
    reach = _greatest(x) if method == "absmax" else _percentile(x)
    return (*_absmax(x, reach, quant), np.zeros(1, np.float32))


def limits(quant: Quant) -> tuple[float, float]:
    """Least and greatest code, or value of a code."""
    return forms.limits(quant.form, quant.bits)


def level_dtype(quant: Quant) -> type:
    """Of what codes stand for before scales: whole numbers are their own codes."""
    return np.int8 if quant.form == "int" else np.float32


def kept_scale(scale: Array, quant: Quant) -> Array:
    """The scale as stored, back in f32; 1 where it vanished or nearly did, so that dividing is safe."""
    with np.errstate(over="ignore"):
        scale = np.abs(scale) if quant.scale == POWERS else scale  # powers of two have no sign
        kept = scale.astype(NUMPY[quant.scale]).astype(np.float32)
    kept[np.abs(kept) < VANISHED] = 1
    return kept


def nearest_codes(x: Array, scale: Array, quant: Quant) -> Array:
    """Nearest codes (or what they stand for), in f32."""
    return forms.nearest(x / scale, quant.form, quant.bits)


def _greatest(x: Array) -> Array:
    return np.abs(x).max(1, keepdims=True)


def _percentile(x: Array) -> Array:
    return np.percentile(np.abs(x), PERCENTILE, axis=1, keepdims=True).astype(np.float32)


def _absmax(x: Array, reach: Array, quant: Quant) -> tuple[Array, Array]:
    """The magnitude to reach at half a step past the last code: no smaller one errs by more than half a step."""
    past = 0.5 if quant.form == "int" else 0.0
    scale = kept_scale(reach / (limits(quant)[1] + past), quant)
    return nearest_codes(x, scale, quant), scale


def _asymmetric(x: Array, quant: Quant, share: float) -> tuple[Array, Array, Array]:
    low, high = limits(quant)
    least, most = np.minimum(x.min(1, keepdims=True), 0) * share, np.maximum(x.max(1, keepdims=True), 0) * share
    scale = kept_scale((most - least) / (high - low), quant)
    zero = np.clip(np.rint(low - least / scale), low, high)
    return np.clip(np.rint(x / scale) + zero, low, high), scale, zero


def _asymmetric_search(x: Array, quant: Quant, weight: Array | None) -> tuple[Array, Array, Array]:
    """Of ranges that are cut more and more the one of least squared error."""
    best, scale, zero = _asymmetric(x, quant, 1.0)
    error = _error(x, best - zero, scale, weight)
    for share in SHRUNK:
        codes, tried, around = _asymmetric(x, quant, share)
        tried = kept_scale(_fit(x, codes - around, tried, weight), quant)
        wrong = _error(x, codes - around, tried, weight)
        better = wrong < error
        for kept, new in ((best, codes), (scale, tried), (zero, around), (error, wrong)):
            np.copyto(kept, new, where=better)
    return best, scale, zero


def _least_squares(x: Array, quant: Quant, weight: Array | None) -> tuple[Array, Array]:
    """Of a grid of scales that of least squared error; the extreme value is on the side with more codes."""
    best, scale = _absmax(x, _greatest(x), quant)
    error = _error(x, best, scale, weight)
    extreme = np.where(
        x.max(1, keepdims=True) > -x.min(1, keepdims=True), x.max(1, keepdims=True), x.min(1, keepdims=True)
    )
    for fraction in POWERS_GRID if quant.scale == POWERS else GRID:
        tried = kept_scale(extreme * (fraction / limits(quant)[0]), quant)
        codes = nearest_codes(x, tried, quant)
        tried = kept_scale(_fit(x, codes, tried, weight), quant)
        wrong = _error(x, codes, tried, weight)
        better = wrong < error
        np.copyto(best, codes, where=better)
        np.copyto(scale, tried, where=better)
        np.copyto(error, wrong, where=better)
    return best, scale


def _fit(x: Array, codes: Array, scale: Array, weight: Array | None) -> Array:
    """The scale that fits these codes best: x.q / q.q."""
    left = codes if weight is None else codes * weight
    square = np.einsum("gkn,gkn->gn", left, codes)[:, None]
    return np.where(square > 0, np.einsum("gkn,gkn->gn", x, left)[:, None] / np.where(square > 0, square, 1), scale)


def _error(x: Array, codes: Array, scale: Array, weight: Array | None) -> Array:
    wrong = codes * scale
    wrong -= x
    return np.einsum("gkn,gkn->gn", wrong, wrong if weight is None else wrong * weight)[:, None]


def stored(codes: Array, scales: Array, zeros: Array, quant: Quant, shape: tuple[int, ...], where: str) -> Arrays:
    """What is kept of codes (of the parameter's shape, or filled up), scales and zeros [groups,1,the rest]."""
    if not np.isfinite(scales.astype(NUMPY[quant.scale]).astype(np.float32)).all():
        raise EffcError(f"{where}: weights too large for {quant.scale} scales, want scale=f32")
    axis = quant.axis % len(shape)
    rest = (*shape[:axis], *shape[axis + 1 :])
    codes = forms.encode(codes, quant.form)
    cut = np.take(codes, range(shape[axis]), axis) if codes.shape != shape else codes

    def small(values: Array) -> Array:
        return np.moveaxis(values.reshape(-1, *rest), 0, axis)

    return as_stored(cut, small(scales), None if quant.sym else small(zeros), quant)


def as_stored(codes: Array, scales: Array, zeros: Array | None, quant: Quant) -> Arrays:
    """Codes i8 of the parameter's shape as bytes, scales and zeros (in groups along the coded axis) in their dtype."""
    kept = {"scales": scales, **({} if zeros is None else {"zeros": zeros})}
    narrow = {suffix: np.ascontiguousarray(values.astype(NUMPY[quant.scale])) for suffix, values in kept.items()}
    return {"codes": pack(codes, quant.bits), **narrow}
