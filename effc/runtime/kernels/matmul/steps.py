"""What one grid step of the TPU matmul computes: digits of activations, products of spans of K, scaled partial sums.

Rows of digits [digit, block, token]: high digits of every token, then low ones; where groups are shorter than
DEPTH, block j keeps only the j-th group of every DEPTH elements, so that one product gives the sums of them all.
A FEW tokens go [digit, token, block] and high and low sums are joined last: they share registers of 8 rows.
Columns are taken in strips, so that a strip's sums stay in registers over the whole of K.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

DEPTH = 128
"""Elements of K that one push of the matrix unit takes."""

FEW = 4
"""Tokens up to which digits are joined last."""

PIECE = 512
"""Places of x whose digits are made at once."""

_ROUNDS = 1.5 * 2.0**23
"""Added to a number below 2^22, leaves it rounded to a whole one (halves to even) in the low bits of the sum."""

_ROUNDS_BITS = 0x4B400000

_SHORT = 1024
"""Elements up to which 128 high + low fits in int32."""


@dataclass(frozen=True)
class Form:
    """rows: tokens in a step; digits: int8 numbers an activation; group: elements a scale, extent where one a column.

    strip: columns whose sums are held at once, the width of the matrix unit; inside: whether the kernel quantizes x.
    """

    rows: int
    extent: int
    columns: int
    group: int
    digits: int = 2
    layout: str = "kn"
    strip: int = 128
    inside: bool = True

    @property
    def groups(self) -> int:
        """Scales of a column."""
        return -(-self.extent // self.group)

    @property
    def blocks(self) -> int:
        """Groups in one product."""
        return DEPTH // self.group if self.group < DEPTH and DEPTH % self.group == 0 else 1

    @property
    def few(self) -> bool:
        """Whether digits are joined last."""
        return self.rows <= FEW

    @property
    def digit_rows(self) -> int:
        """Rows that the matrix unit sees."""
        return self.digits * self.blocks * self.rows

    @property
    def sums(self) -> int:
        """Rows of partial sums that are scaled."""
        return self.digit_rows if self.few else self.blocks * self.rows

    def spans(self) -> list[tuple[int, int]]:
        """[start, stop) along K of each product."""
        deep = self.group * self.blocks
        return [(at, min(at + deep, self.extent)) for at in range(0, self.extent, deep)]

    def strips(self) -> list[tuple[int, int]]:
        """[start, stop) of columns."""
        return [(at, min(at + self.strip, self.columns)) for at in range(0, self.columns, self.strip)]

    def tile_bytes(self, bits: int, sizes: Sequence[int]) -> float:
        """A step's codes, scales and zero points; sizes: bytes of one of each."""
        return self.columns * (self.extent * bits / 8 + self.groups * sum(sizes))


def split(whole: jax.Array, digits: int) -> list[jax.Array]:
    """int32 digits of whole numbers, the highest first: 128 high + low."""
    if digits == 1:
        return [whole]
    high = (whole + 64) >> 7
    return [high, whole - (high << 7)]


def unit(reach: jax.Array, digits: int) -> tuple[jax.Array, jax.Array]:
    """t, what a last digit is worth where the greatest magnitude is `reach`, and its inverse."""
    t = reach / (127 * 128 if digits == 2 else 127)
    return t, 1 / jnp.where(t == 0, 1, t)


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean x^2 + eps) * (scale + offset), with the scale[1,K] in a ref."""

    scale: Any
    eps: float
    offset: float

    def size(self, squares: jax.Array, extent: int) -> jax.Array:
        """What is left when x is times the scale, from the sum of x^2."""
        return lax.rsqrt(squares / extent + self.eps)


def quantize(x_ref: Any, d_ref: Any, t_ref: Any, sums_ref: Any | None, form: Form, norm: Norm | None = None) -> None:
    """Digits of x, or of its norm, as rows of products, and for zero points the sum of each row in each span."""
    pieces = [(at, min(at + PIECE, form.extent)) for at in range(0, form.extent, PIECE)]

    def piece(a: int, b: int) -> jax.Array:
        x = x_ref[:, a:b].astype(jnp.float32)
        return x if norm is None else x * (norm.scale[:, a:b].astype(jnp.float32) + norm.offset)

    reach = [jnp.max(jnp.abs(piece(a, b)), axis=-1, keepdims=True) for a, b in pieces]
    t, inverse = unit(functools.reduce(jnp.maximum, reach), form.digits)
    if norm is None:
        t_ref[...] = t
    else:
        squares = [jnp.sum(jnp.square(x_ref[:, a:b].astype(jnp.float32)), axis=-1, keepdims=True) for a, b in pieces]
        t_ref[...] = t * norm.size(functools.reduce(jnp.add, squares), form.extent)
    for a, b in pieces:
        shifted = piece(a, b) * inverse + _ROUNDS
        whole = lax.bitcast_convert_type(shifted, jnp.int32) - _ROUNDS_BITS
        d_ref[:, a:b] = jnp.concatenate(list(_rows(split(whole, form.digits), a, form))).astype(jnp.int8)
    if sums_ref is not None:
        sum_spans(d_ref, sums_ref, form)


def _rows(parts: list[jax.Array], at: int, form: Form) -> Iterator[jax.Array]:
    """int32 of places from `at` on, in the order of the module's note."""
    place = lax.broadcasted_iota(jnp.int32, (1, parts[0].shape[1]), 1) + at
    place = place >> form.group.bit_length() - 1 & form.blocks - 1  # both powers of two
    for whole in parts:
        if form.blocks == 1:
            yield whole
        elif form.few:
            yield from (
                jnp.where(place == j, whole[m : m + 1], 0) for m in range(form.rows) for j in range(form.blocks)
            )
        else:
            yield from (jnp.where(place == j, whole, 0) for j in range(form.blocks))


def sum_spans(d_ref: Any, sums_ref: Any, form: Form) -> None:
    """f32 [spans,rows,DEPTH] sums of each row of digits in each span, in every lane: a product with ones."""
    for i, (start, stop) in enumerate(form.spans()):
        ones = jnp.ones((stop - start, DEPTH), jnp.int8)
        p = _dot(d_ref[:, start:stop], ones, "kn")
        sums_ref[i] = p.astype(jnp.float32) if form.few else _joined(p, slice(0, form.sums), form)


def multiply(
    d_ref: Any, t: jax.Array, w_ref: Any, s_ref: Any, z_ref: Any, sums_ref: Any, o_ref: Any, form: Form
) -> None:
    """All columns of a step; s_ref and z_ref f32 [groups,columns], z_ref and sums_ref None without zero points."""
    for start, stop in form.strips():
        columns, total = slice(start, stop), None
        for i, (a, b) in enumerate(form.spans()):
            w = w_ref[a:b, columns] if form.layout == "kn" else w_ref[columns, a:b]
            sums = None if sums_ref is None else sums_ref.at[i]
            part = _scaled(_dot(d_ref[:, a:b], w, form.layout), i, columns, s_ref, z_ref, sums, form)
            total = part if total is None else total + part
        assert total is not None
        o_ref[:, columns] = (_last(total, form) * t).astype(o_ref.dtype)


def _scaled(p: jax.Array, span: int, columns: slice, s_ref: Any, z_ref: Any, sums_ref: Any, form: Form) -> jax.Array:
    """f32 partial sums, less zeros, times scales: [tokens,columns], or, of a few tokens, each row by itself."""
    first, width = span * form.blocks, p.shape[1]
    if form.few:
        p = p.astype(jnp.float32)
        if z_ref is not None:
            p = p - _wide(sums_ref[...], width) * _tiled(z_ref, first, columns, form)
        return p * _tiled(s_ref, first, columns, form)
    total = None
    for j in range(min(form.blocks, s_ref.shape[0] - first)):
        rows, group = slice(j * form.rows, (j + 1) * form.rows), slice(first + j, first + j + 1)
        part = _joined(p, rows, form)
        if z_ref is not None:
            part = part - _wide(sums_ref[rows], width) * z_ref[group, columns]
        part = part * s_ref[group, columns]
        total = part if total is None else total + part
    assert total is not None
    return total


def _dot(x: jax.Array, w: jax.Array, layout: str) -> jax.Array:
    """int32 [rows,columns]; int4 codes become int8 on their way to the matrix unit."""
    axes = (((1,), (0 if layout == "kn" else 1,)), ((), ()))
    return lax.dot_general(x, w.astype(jnp.int8), axes, preferred_element_type=jnp.int32)


def _joined(p: jax.Array, rows: slice, form: Form) -> jax.Array:
    """f32 sums of all digits together."""
    if form.digits == 1:
        return p[rows].astype(jnp.float32)
    high, low = p[rows], p[form.sums + rows.start : form.sums + rows.stop]
    if form.group <= _SHORT:
        return (high * 128 + low).astype(jnp.float32)
    return high.astype(jnp.float32) * 128 + low.astype(jnp.float32)


def _tiled(ref: Any, first: int, columns: slice, form: Form) -> jax.Array:
    """A span's scales or zeros for rows [digit, token, block]; one row for all where there are no blocks."""
    if form.blocks == 1:
        return ref[first : first + 1, columns]
    held = min(form.blocks, ref.shape[0] - first)
    mine = ref[first : first + held, columns]
    rest = [jnp.zeros((form.blocks - held, mine.shape[1]), jnp.float32)] * (held < form.blocks)
    return jnp.concatenate([mine, *rest] * (form.sums // form.blocks))


def _wide(sums: jax.Array, columns: int) -> jax.Array:
    """[rows,columns] of equal columns."""
    return jnp.concatenate([sums] * pl.cdiv(columns, DEPTH), axis=1)[:, :columns]


def _last(total: jax.Array, form: Form) -> jax.Array:
    """f32 [tokens,columns]; of a few tokens, sums over blocks and digits."""
    if not form.few:
        return total
    if form.blocks > 1:
        pieces = [total[i : i + form.blocks] for i in range(0, form.sums, form.blocks)]
        total = jnp.concatenate([jnp.sum(piece, axis=0, keepdims=True) for piece in pieces])
    return total if form.digits == 1 else total[: form.rows] * 128 + total[form.rows :]


def half(bits: jax.Array) -> jax.Array:
    """f32 of IEEE half floats given as int16 bits: exact, subnormals too (the vector unit has no halves)."""
    wide = bits.astype(jnp.int32)
    size = (wide & 0x7FFF) << 13
    normal = lax.bitcast_convert_type(size + (112 << 23), jnp.float32)
    tiny = lax.bitcast_convert_type(size + (113 << 23), jnp.float32) - 2.0**-14
    value = lax.bitcast_convert_type(jnp.minimum(normal, tiny), jnp.int32)  # of both the right one is the smaller
    return lax.bitcast_convert_type(value | wide & -(2**31), jnp.float32)
