"""Grouped quantized matmul for TPUs (Pallas): weights stay coded until they reach the int8 matrix unit.

Activations become two int8 digits a token, x = t (128 hi + lo), exact to 15 bits, stacked as rows: the
matrix unit's cost is the weights', so the second digit is nearly free. Each group's partial sums are
int32, exact, and are scaled once in f32; groups are unrolled so that pushes, products and sums overlap.
Groups smaller than the unit is deep go block-diagonally: row block j keeps only the j-th group of
every DEPTH elements, and one product gives the partial sums of them all.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effc.runtime.kernels import on_tpu
from effc.runtime.qarray import QArray

DEPTH = 128
"""Elements that one push of the matrix unit takes along K."""

ROWS = 64
"""Rows of x up to which scaling partial sums costs less than scaling weights."""

TILE = 2 * 2**20
"""Bytes of codes in one step: enough to hide a step's fixed cost, little enough for the first, exposed, fill."""

VMEM = 64 * 2**20


def fits(x: jax.Array, w: QArray, layout: str) -> bool:
    """Whether the kernel takes x[R,K] and w: few rows, codes one an element, groups along K that divide it."""
    extent = x.shape[1]
    group = w.group or extent
    along = (layout, w.axis) in (("kn", -2), ("nk", -1))
    whole = extent % group == 0 and (group % DEPTH == 0 or DEPTH % group == 0 or group == extent)
    plain = w.codes.ndim == 2 and w.codes.dtype in (jnp.int8, jnp.int4)
    return along and whole and plain and 0 < x.shape[0] <= ROWS and (layout == "kn" or group == extent)


def prepared(w: QArray) -> QArray:
    """4-bit codes as an int4 array, one an element: what the kernel reads. Done once, when weights are loaded."""
    if w.bits > 4 or w.form != "int" or w.codes.dtype == jnp.int4:
        return w
    return replace(w, codes=w.unpacked().astype(jnp.int4))


def matmul(x: jax.Array, w: QArray, layout: str, *, interpret: bool = False) -> jax.Array:
    """f32[R,N] from x f32[R,K] and w[K,N] (layout nk: w[N,K], one scale a row)."""
    rows, extent = x.shape
    width = w.shape[1 if layout == "kn" else 0]
    group = min(w.group or extent, extent)
    scales = _by_group(w.scales, layout)
    padded = jnp.pad(x, ((0, _padding(rows)), (0, 0)))
    y = _call(padded, w.codes, scales, group=group, width=width, layout=layout, interpret=interpret)[:rows]
    if w.zeros is not None:
        y = y - _group_sums(x, group) @ (_by_group(w.zeros, layout) * scales)
    return y


def digits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [2R,K], high digits then low, and f32 [R,1]: x = t (128 hi + lo) to a 32512th of each row's greatest."""
    t = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / (127 * 128)
    whole = jnp.round(x / jnp.where(t == 0, 1, t))
    high = jnp.round(whole / 128)
    return jnp.concatenate([high, whole - 128 * high]).astype(jnp.int8), t


def block_diagonal(xd: jax.Array, group: int) -> jax.Array:
    """int8 [2 r R,K] from digits [2R,K], r = DEPTH / group: high digits of every j, then low ones."""
    many, extent = DEPTH // group, xd.shape[1]
    mine = (jnp.arange(extent)[None] // group) % many == jnp.arange(many)[:, None]
    kept = jnp.where(mine[None, :, None, :], xd.reshape(2, 1, -1, extent), 0)
    return kept.reshape(-1, extent)


def _padding(rows: int) -> int:
    """To whole registers of 8 rows; one row alone has a form of its own."""
    return 0 if rows == 1 else -rows % 8


def _by_group(values: jax.Array, layout: str) -> jax.Array:
    """f32 [K/G,N]."""
    return (values if layout == "kn" else values.T).astype(jnp.float32)


def _group_sums(x: jax.Array, group: int) -> jax.Array:
    """f32 [R,K/G]."""
    return x.reshape(x.shape[0], -1, group).sum(axis=-1)


def tile(extent: int, width: int, bits: int) -> int:
    """Columns of a step: all of them, or whole lanes whose codes are TILE bytes at most."""
    fitting = max(TILE * 8 // (bits * extent) // 128 * 128, 128)
    return width if fitting >= width else fitting


def _call(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, group: int, width: int, layout: str, interpret: bool
) -> jax.Array:
    rows, extent = x.shape
    xd, t = digits(x)
    small = group < DEPTH and extent % DEPTH == 0
    xd = block_diagonal(xd, group) if small else xd
    columns = tile(extent, width, 4 if codes.dtype == jnp.int4 else 8)
    block = (extent, columns) if layout == "kn" else (columns, extent)
    place = (lambda n: (0, n)) if layout == "kn" else (lambda n: (n, 0))
    bits, steps = 4 if codes.dtype == jnp.int4 else 8, pl.cdiv(width, columns)
    name = f"matmul_int{bits}_{extent}x{width}_g{group}_m{rows}"
    on_tpu.note(name, columns * (extent * bits / 8 + 4 * scales.shape[0]), steps)
    body = functools.partial(_diagonal if small else _grouped, group=group, rows=rows, layout=layout)
    return pl.pallas_call(
        body,
        name=name,
        grid=(steps,),
        in_specs=[
            pl.BlockSpec(xd.shape, lambda n: (0, 0)),
            pl.BlockSpec((rows, 1), lambda n: (0, 0)),
            pl.BlockSpec(block, place),
            pl.BlockSpec((scales.shape[0], columns), lambda n: (0, n)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda n: (0, n)),
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.float32),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
        interpret=interpret,
    )(xd, t, codes, scales)


def _dot(x: jax.Array, w: jax.Array, layout: str) -> jax.Array:
    """int32 [rows,columns]; int4 codes become int8 on their way to the matrix unit."""
    axes = (((1,), (0 if layout == "kn" else 1,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(jnp.int8), axes, preferred_element_type=jnp.int32)


def _grouped(x_ref, t_ref, w_ref, s_ref, o_ref, *, group: int, rows: int, layout: str) -> None:  # type: ignore[no-untyped-def]
    """A product a group; for each its partial sums, both digits together, times the scales."""
    total = None
    for g in range(x_ref.shape[1] // group):
        span = slice(g * group, (g + 1) * group)
        w = w_ref[span, :] if layout == "kn" else w_ref[:, span]
        part = _joined(_dot(x_ref[:, span], w, layout), rows, group) * s_ref[g : g + 1, :]
        total = part if total is None else total + part
    o_ref[...] = total * t_ref[...]


def _joined(p: jax.Array, rows: int, group: int) -> jax.Array:
    """f32 sums from those of high and low digits; in int32, which is exact, where they fit."""
    high, low = p[:rows], p[rows:]
    if group <= 1024:
        return (high * 128 + low).astype(jnp.float32)
    return high.astype(jnp.float32) * 128 + low.astype(jnp.float32)


def _diagonal(x_ref, t_ref, w_ref, s_ref, o_ref, *, group: int, rows: int, layout: str) -> None:  # type: ignore[no-untyped-def]
    """A product for each DEPTH elements, all their groups at once (layout kn)."""
    many, total = DEPTH // group, None
    for d in range(x_ref.shape[1] // DEPTH):
        span = slice(d * DEPTH, (d + 1) * DEPTH)
        p = _joined(_dot(x_ref[:, span], w_ref[span, :], layout), many * rows, group)
        part = _scaled_blocks(p, s_ref[d * many : (d + 1) * many, :], rows)
        total = part if total is None else total + part
    assert total is not None
    total = jnp.sum(total, axis=0, keepdims=True) if rows == 1 else total
    o_ref[...] = total * t_ref[...]


def _scaled_blocks(p: jax.Array, scales: jax.Array, rows: int) -> jax.Array:
    """Row blocks of p times their scales, and summed; one row's blocks are left to be summed at the end."""
    if rows == 1:
        return p * scales
    return sum(p[j * rows : (j + 1) * rows] * scales[j : j + 1] for j in range(scales.shape[0]))  # type: ignore[return-value]
