"""What the codes of quantized arrays stand for, and how they lie in files; numpy alone.

Stored layout, version 2. Codes of b < 8 bits are bytes: along the last axis, element j takes bits b*j to b*j+b-1
of its row's bits, the least significant first; a row begins at a byte, and what is left of its last byte is 0.
So 4-bit codes lie two a byte, the low half first, and eight codes of b bits fill b bytes. Codes of 8 bits are int8.
Whole numbers are two's complement. Codes of `nf4` and `fp4e2m1` are numbers of CODEBOOKS (15 is stored as 15);
those of the 8-bit floats are their bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from effc.widths import BITS, row_bytes

Array = np.ndarray[Any, Any]

VERSION = 2
"""Of the stored layout. Version 1 kept 2 and 3 bits in four, 5 to 7 in eight; 4 and 8 bits are as they were."""

_NORMAL = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

CODEBOOKS: Mapping[str, Array] = {
    "nf4": np.asarray(_NORMAL, np.float32),  # quantiles of a normal distribution (QLoRA)
    "fp4e2m1": np.asarray([*_FP4, *(-x for x in _FP4)], np.float32),  # sign, two bits of exponent, one of fraction
}
"""f32[16] by code."""

FLOATS: Mapping[str, np.dtype[Any]] = {
    "fp8e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "fp8e5m2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip


def limits(form: str, bits: int) -> tuple[float, float]:
    """Least and greatest value of a code."""
    if form in FLOATS:
        most = float(ml_dtypes.finfo(FLOATS[form]).max)
        return -most, most
    if form in CODEBOOKS:
        return float(CODEBOOKS[form].min()), float(CODEBOOKS[form].max())
    return -(1 << bits - 1), (1 << bits - 1) - 1


def nearest(x: Array, form: str, bits: int) -> Array:
    """The value of the nearest code, f32; x may be written over."""
    low, high = limits(form, bits)
    if form in FLOATS:
        return np.clip(x, low, high).astype(FLOATS[form]).astype(np.float32)
    if form in CODEBOOKS:
        levels = np.unique(CODEBOOKS[form])
        return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    np.rint(x, out=x)
    return np.clip(x, low, high, out=x)


def encode(values: Array, form: str) -> Array:
    """int8 codes of values that codes stand for (whole numbers as they are)."""
    if form in FLOATS:
        return values.astype(FLOATS[form]).view(np.int8)
    if form not in CODEBOOKS:
        return values.astype(np.int8)
    book = CODEBOOKS[form]
    order = np.argsort(book, kind="stable")
    found = order[np.searchsorted(book[order], values.astype(np.float32))]
    return np.where(found > 7, found - 16, found).astype(np.int8)


def decode(codes: Array, form: str) -> Array:
    """Values of int8 codes, f32."""
    if form in FLOATS:
        return codes.view(FLOATS[form]).astype(np.float32)
    return CODEBOOKS[form][codes & 15] if form in CODEBOOKS else codes.astype(np.float32)


# ---- bytes


def pack(codes: Array, bits: int = 4) -> Array:
    """As stored, from codes i8[..,N]: u8[..,ceil(N*bits/8)], or the codes themselves where they have 8 bits."""
    if bits == 8:
        return np.ascontiguousarray(codes, np.int8)
    width = codes.shape[-1]
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -width % 8)]) if width % 8 else codes
    eights = padded.astype(np.int8).view(np.uint8).reshape(*codes.shape[:-1], -1, 8)
    words = np.zeros(eights.shape[:-1], np.uint64)
    for i in range(8):
        words |= (eights[..., i] & np.uint8((1 << bits) - 1)).astype(np.uint64) << np.uint64(bits * i)
    whole = words.astype("<u8")[..., None].view(np.uint8)[..., :bits].reshape(*codes.shape[:-1], -1)
    return np.ascontiguousarray(whole[..., : row_bytes(width, bits)])


def unpack(stored: Array, width: int, bits: int) -> Array:
    """Codes i8[..,width], from what `pack` gave."""
    if bits == 8:
        return stored
    short = -(-width // 8) * bits - stored.shape[-1]
    padded = np.pad(stored, [(0, 0)] * (stored.ndim - 1) + [(0, short)]) if short else stored
    eights = np.zeros((*stored.shape[:-1], padded.shape[-1] // bits, 8), np.uint8)
    eights[..., :bits] = padded.reshape(*eights.shape[:-1], bits)
    words, out = eights.view("<u8")[..., 0], np.empty(eights.shape, np.uint8)
    for i in range(8):
        out[..., i] = (words >> np.uint64(bits * i)).astype(np.uint8) & np.uint8((1 << bits) - 1)
    signed = np.left_shift(out, 8 - bits).view(np.int8) >> (8 - bits)
    return signed.reshape(*stored.shape[:-1], -1)[..., :width]


def held(stored: Array, width: int, bits: int) -> Array:
    """As programs hold codes: 4 bits and 8 as stored, fewer widened to 4, those between to 8."""
    if bits in (4, 8):
        return stored
    codes = unpack(stored, width, bits)
    return pack(codes, 4) if bits < 4 else codes


__all__ = [
    "BITS", "CODEBOOKS", "FLOATS", "VERSION", "decode", "encode", "held", "limits", "nearest", "pack", "row_bytes",
    "unpack",
]  # fmt: skip
