"""Products with quantized matrices: for a few rows on CPUs a native kernel, else XLA.

XLA writes a dequantized matrix out whole, some ten times slower than it reads the same matrix in f32.
For a few rows it is made to take one block of codes at a time, small enough to stay in cache (measured,
one to sixteen rows: about the speed of f32 weights). For many rows the whole matrix is worth it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.matmul import native
from effc.runtime.kernels.region import native as region
from effc.runtime.packed import Packed
from effc.runtime.qarray import QArray

FEW = 32
"""Rows up to which XLA takes the matrix in blocks."""

_WIDEST, _OUTPUTS = 128, 256


def matmul(x: jax.Array, w: QArray | Packed, layout: str) -> jax.Array:
    """f32 [R,N] from x f32[R,K] and w[K,N] (layout nk: w[N,K]); a program that may run on a TPU carries its kernel."""
    if isinstance(w, Packed):
        return region.matmul(x, w) if layout == w.layout and region.usable() else by_xla(x, w.plain(), layout)
    if w.form != "int":
        return by_xla(x, w, layout)
    plain = partial(here, layout=layout)
    if on_tpu.wanted():
        from effc.runtime.kernels.matmul import tpu  # Pallas takes half a second to import

        if tpu.fits(x, w, layout):
            return on_tpu.either(partial(tpu.matmul, layout=layout, digits=tpu.digits_wanted()), plain, x, w)
    return plain(x, w)


def rows(table: QArray, ids: jax.Array) -> jax.Array:
    """f32[...,D]: rows of table[V,D], grouped along D, at ids[...]; programs that may run on a TPU carry a kernel."""
    if on_tpu.wanted() and table.form == "int":
        from effc.runtime.kernels.lookup import reference, tpu  # Pallas takes half a second to import

        if tpu.fits(table.codes) and ids.size:
            codes = on_tpu.either(tpu.rows, reference.rows, table.codes, ids.reshape(-1))
            return table.rows(ids).dequantize(codes=codes.reshape(*ids.shape, -1))
    return table.rows(ids).dequantize()


def here(x: jax.Array, w: QArray, layout: str) -> jax.Array:
    """`matmul` on this machine or any other that is no TPU."""
    w = w.plain()
    if w.codes.dtype != jnp.int4 and native.fits(x, w, layout) and native.available():
        return native.matmul(x, w, layout)
    return by_xla(x, w, layout)


def by_xla(x: jax.Array, w: QArray, layout: str) -> jax.Array:
    """The same of XLA's own ops, on any machine."""
    few = x.shape[0] <= FEW and w.form == "int"
    if layout == "kn" and few and w.axis == -2 and _block(w):
        return _by_groups(x, w, _block(w))
    if layout == "nk" and few and w.axis == -1 and _even(w) and not (x.shape[0] == 1 and not _paired(w)):
        return _by_outputs(x, w)
    axes = (((1,), (0 if layout == "kn" else 1,)), ((), ()))
    return lax.dot_general(x, w.dequantize(), axes)


def _block(w: QArray) -> int:
    """Rows of codes [K,N] to take at once: a group, or a divisor of a wide one; 0 where too few."""
    extent = w.shape[-2]
    group = min(w.group or extent, extent)
    size = next(n for n in range(min(group, _WIDEST), 0, -1) if group % n == 0)
    return size if size >= 8 else 0


def _even(w: QArray) -> bool:
    """Whether rows of codes are whole groups of whole bytes."""
    return w.width % (w.group or w.width) == 0 and (w.group or w.width) % 2 == 0


def _paired(w: QArray) -> bool:
    """Whether codes lie two a byte."""
    return w.bits <= 4 and w.codes.dtype != jnp.int4


def _halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32 codes in the low and the high four bits."""
    signed = lax.bitcast_convert_type(packed, jnp.int8)
    low, high = jnp.left_shift(signed, 4) >> 4, signed >> 4
    return low.astype(jnp.float32), high.astype(jnp.float32)


def _by_groups(x: jax.Array, w: QArray, block: int) -> jax.Array:
    """w[K,N]: sums over `block` rows of codes, then times their scale."""
    extent, width = w.shape
    group = w.group or extent
    parts = _columns(w)

    def step(i: jax.Array, total: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        codes = lax.dynamic_slice_in_dim(w.codes, i * block, block, 0)
        rows = lax.dynamic_slice_in_dim(x, i * block, block, 1)
        at = i * block // group
        return tuple(
            out + _scaled(rows, half, scales, zeros, at)
            for out, half, (scales, zeros) in zip(total, _codes(codes, _paired(w)), parts, strict=True)
        )

    empty = jnp.zeros((x.shape[0], w.codes.shape[1]), jnp.float32)
    sums = lax.fori_loop(0, extent // block, step, (empty,) * len(parts))
    y = sums[0] if len(sums) == 1 else jnp.stack(sums, axis=-1).reshape(x.shape[0], -1)[:, :width]
    rest = extent % block
    return y + x[:, -rest:] @ _last_rows(w, rest).dequantize() if rest else y


def _codes(codes: jax.Array, paired: bool) -> tuple[jax.Array, ...]:
    return _halves(codes) if paired else (codes.astype(jnp.float32),)


def _columns(w: QArray) -> list[tuple[jax.Array, jax.Array | None]]:
    """Scales and zeros f32[groups,columns]: of all columns, or packed ones' even and odd."""
    if not _paired(w):
        return [(w.scales.astype(jnp.float32), None if w.zeros is None else w.zeros.astype(jnp.float32))]

    def half(values: jax.Array, odd: int) -> jax.Array:
        even = jnp.pad(values, ((0, 0), (0, values.shape[1] % 2)))
        return even[:, odd::2].astype(jnp.float32)

    return [(half(w.scales, i), None if w.zeros is None else half(w.zeros, i)) for i in (0, 1)]


def _scaled(x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, at: jax.Array) -> jax.Array:
    """(x @ (codes - zero)) * scale for rows of one group."""
    y = lax.dot_general(x, codes, (((1,), (0,)), ((), ())))
    if zeros is not None:
        y = y - jnp.sum(x, axis=1, keepdims=True) * lax.dynamic_slice_in_dim(zeros, at, 1, 0)
    return y * lax.dynamic_slice_in_dim(scales, at, 1, 0)


def _last_rows(w: QArray, count: int) -> QArray:
    """The last rows of codes [K,N], all of one group."""
    zeros = None if w.zeros is None else w.zeros[-1:]
    return replace(w, codes=w.codes[-count:], scales=w.scales[-1:], zeros=zeros, group=0)


def _by_outputs(x: jax.Array, w: QArray) -> jax.Array:
    """w[N,K]: a block of rows at a time; the last block may overlap the one before (slices move inwards)."""
    outputs, extent = w.shape
    block = min(_OUTPUTS, outputs)
    halves = [x[:, 0::2].T, x[:, 1::2].T] if _paired(w) else [x.T]
    groups = extent // (w.group or extent)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        codes, scales, zeros = (
            None if part is None else lax.dynamic_slice_in_dim(part, i * block, block, 0)
            for part in (w.codes, w.scales, w.zeros)
        )
        assert codes is not None and scales is not None
        y = jnp.zeros((block, x.shape[0]), jnp.float32)
        for half, values in zip(_codes(codes, _paired(w)), halves, strict=True):
            grouped = half.reshape(block, groups, -1)
            grouped = grouped if zeros is None else grouped - zeros.astype(jnp.float32)[:, :, None]
            y = y + (grouped * scales.astype(jnp.float32)[:, :, None]).reshape(block, -1) @ values
        return lax.dynamic_update_slice_in_dim(out, y, i * block, 0)

    empty = jnp.zeros((outputs, x.shape[0]), jnp.float32)
    return lax.fori_loop(0, -(-outputs // block), step, empty).T
