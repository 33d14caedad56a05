"""Grouped quantized matmul for TPUs (Pallas): weights stay coded until they reach the int8 matrix unit.

Activations become two int8 digits a token, x = t (128 high + low), exact to 15 bits, stacked as rows: the
matrix unit's cost is the weights', so the second digit is nearly free. One digit (W4A8, W8A8) is EFFC_ACTIVATIONS=8.
For a few rows the kernel makes the digits itself, in its first step, which waits for HBM anyway; for many
(prefill) XLA makes them once, and a step takes BLOCK rows of them. Weights stacked over layers [L,K,N] are read
where they lie, at a layer number that is known before the grid runs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.generations import GENERATIONS, NO_INT8
from effc.runtime.kernels.matmul import steps, tiling
from effc.runtime.kernels.matmul.steps import Form, Norm
from effc.runtime.kernels.on_tpu import Call
from effc.runtime.qarray import QArray

LANES = 128
BLOCK = 64
"""Tokens of a step; above it the grid has blocks of them."""

SCALES = ("float32", "float16", "bfloat16", "int16")
"""int16: half floats by their bits, since the vector unit has no halves and XLA would copy to see them so."""

_ALIGNED = 32
"""Rows of int8 codes in a register: groups that part K elsewhere are XLA's."""


def digits_wanted() -> int:
    """int8 numbers an activation: 2, or 1 where EFFC_ACTIVATIONS=8."""
    return 1 if os.environ.get("EFFC_ACTIVATIONS") == "8" else 2


def fits(x: jax.Array, w: QArray, layout: str) -> bool:
    """Whether the kernel takes x[R,K] and w: codes one an element, groups along K; w[N,K] with one scale a row."""
    extent = x.shape[1]
    group = min(w.group or extent, extent)
    along = (layout, w.axis) in (("kn", -2), ("nk", -1))
    plain = w.codes.ndim in (2, 3) and w.codes.dtype in (jnp.int8, jnp.int4) and w.form == "int"
    known = w.scales.dtype.name in SCALES
    whole = group == extent or (group % _ALIGNED == 0 and layout == "kn")
    there = on_tpu.generation() not in NO_INT8
    return there and along and plain and known and whole and x.shape[0] > 0 and (w.zeros is None or layout == "kn")


def prepared(w: QArray) -> QArray:
    """Codes one an element, 4-bit ones int4; half floats as int16; columns of w[K,N] to whole lanes.

    Once, when weights are loaded. XLA lays arrays out to waste least: with odd columns it would turn w over, and
    copy it back for each product.
    """
    if w.form != "int" or w.axis not in (-1, -2) or w.codes.dtype == jnp.int4:
        return w
    codes = w.unpacked().astype(jnp.int4) if w.bits <= 4 else w.codes
    scales, zeros = (None if v is None else _as_bits(v) for v in (w.scales, w.zeros))
    assert scales is not None
    if w.axis == -1:
        return replace(w, codes=codes, scales=scales, zeros=zeros)
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, -w.width % LANES)]
    zeros = None if zeros is None else jnp.pad(zeros, pad)
    return replace(w, codes=jnp.pad(codes, pad), scales=jnp.pad(scales, pad), zeros=zeros)


def _as_bits(values: jax.Array) -> jax.Array:
    """Half floats as int16."""
    return lax.bitcast_convert_type(values, jnp.int16) if values.dtype == jnp.float16 else values


def matmul(
    x: jax.Array, w: QArray, layer: jax.Array | None = None, norm: Norm | None = None, *, layout: str = "kn",
    digits: int = 2, columns: int = 0, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """f32[R,N] from x[R,K] and w[K,N] (layout nk: w[N,K]), or w[L,K,N] at i32[] `layer`; columns a step, 0: chosen.

    norm: of x, with its scale [1,K], for up to BLOCK rows; what is multiplied is that.
    """
    width = w.codes.shape[-1 if layout == "kn" else -2]
    form = _form(x, w, layout, digits)
    bits, chip = 4 if w.codes.dtype == jnp.int4 else 8, on_tpu.generation()
    sizes = [v.dtype.itemsize for v in (w.scales, w.zeros) if v is not None]
    form = replace(form, columns=columns or tiling.columns(form, width, bits, sizes, chip))
    y = _call(x, w, layer, norm, form, bits, sizes, interpret)
    return y[:, : w.width] if layout == "kn" else y


def of_norm(
    x: jax.Array, w: QArray, scale: jax.Array, *, eps: float, offset: float, layout: str, digits: int,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """`matmul` of the norm of x with a scale [K]."""
    norm = Norm(scale.reshape(1, -1), eps, offset)
    return matmul(x, w, None, norm, layout=layout, digits=digits, interpret=interpret)


def fits_norm(x: jax.Array, w: QArray, scale: jax.Array, layout: str) -> bool:
    """Whether `of_norm` takes x[R,K], w and scale[K]."""
    plain = scale.shape == x.shape[1:] and scale.dtype.name in ("float32", "bfloat16")
    return plain and x.shape[0] <= BLOCK and w.form == "int" and fits(x, w, layout)


def _form(x: jax.Array, w: QArray, layout: str, digits: int) -> Form:
    """All but the columns of a step."""
    rows, extent = x.shape
    inside, group = rows <= BLOCK, min(w.group or extent, extent)
    form = Form(_rounded(rows) if inside else BLOCK, extent, 0, group, digits, layout, inside=inside)
    return replace(form, strip=tiling.strip(form, GENERATIONS[on_tpu.generation()].unit))


def _rounded(rows: int) -> int:
    """To what registers hold: 1, 2, 4, or whole ones of 8."""
    return next((n for n in (1, 2, 4) if n >= rows), -(-rows // 8) * 8)


def _call(
    x: jax.Array, w: QArray, layer: jax.Array | None, norm: Norm | None, form: Form, bits: int, sizes: Sequence[int],
    interpret: bool,
) -> jax.Array:  # fmt: skip
    along, stack = form.layout == "kn", layer is not None
    rows, width = x.shape[0], w.codes.shape[-1 if along else -2]
    grid = (pl.cdiv(width, form.columns), pl.cdiv(rows, form.rows))
    operands, specs = _activations(x, form)
    if norm is not None:
        operands.append(norm.scale)
        specs.append(pl.BlockSpec((1, form.extent), lambda n, m, *_: (0, 0)))
    scales = [_rows_of_groups(v, form.layout) for v in (w.scales, w.zeros) if v is not None]
    kinds, zeros = [str(v.dtype) for v in scales], len(scales) > 1
    block = (form.extent, form.columns) if along else (form.columns, form.extent)
    specs += [_weight_spec(block, along, stack)]
    specs += [_weight_spec((form.groups, form.columns), True, stack) for _ in scales]
    name = _name(form, bits, width, rows, kinds, stack) + "_normed" * (norm is not None)
    later = form.digit_rows * form.extent if grid[1] > 1 else 0  # blocks of rows after the first fetch no weights
    read = form.tile_bytes(bits, sizes) / grid[1] + later
    on_tpu.note(Call(name, read, grid[0] * grid[1], tiling.vmem(form, bits, sizes)))
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=int(stack), grid=grid, in_specs=specs, scratch_shapes=_scratch(form, kinds),
        out_specs=pl.BlockSpec((form.rows, form.columns), lambda n, m, *_: (m, n)),
    )  # fmt: skip
    call = pl.pallas_call(
        functools.partial(_step, form=form, kinds=kinds, zeros=zeros, stack=stack, norm=norm),
        name=name, grid_spec=spec, interpret=interpret,
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.float32),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiling.VMEM[on_tpu.generation()]),
    )  # fmt: skip
    coded = [w.codes, *scales]
    if not interpret:  # XLA would fetch some ahead to VMEM, from where a step takes longer to read them
        coded = [pltpu.with_memory_space_constraint(part, pltpu.HBM) for part in coded]
    return call(*([] if layer is None else [layer.reshape(1).astype(jnp.int32)]), *operands, *coded)


def _activations(x: jax.Array, form: Form) -> tuple[list[jax.Array], list[Any]]:
    """Operands and their blocks: x itself, or its digits and t."""
    if form.inside:
        return [x], [pl.BlockSpec((form.rows, form.extent), lambda n, m, *_: (m, 0))]
    padded = jnp.pad(x.astype(jnp.float32), ((0, -x.shape[0] % form.rows), (0, 0)))
    return list(digits(padded, form)), [
        pl.BlockSpec((form.digit_rows, form.extent), lambda n, m, *_: (m, 0)),
        pl.BlockSpec((form.rows, 1), lambda n, m, *_: (m, 0)),
    ]


def digits(x: jax.Array, form: Form) -> tuple[jax.Array, jax.Array]:
    """int8 [R / rows * digit rows,K] and f32 [R,1], in XLA: for each block of rows what a step takes."""
    t, inverse = steps.unit(jnp.max(jnp.abs(x), axis=-1, keepdims=True), form.digits)
    parts = steps.split(jnp.round(x * inverse).astype(jnp.int32), form.digits)
    stacked = jnp.stack([part.astype(jnp.int8).reshape(-1, form.rows, form.extent) for part in parts], axis=1)
    if form.blocks > 1:
        mine = jnp.arange(form.extent)[None] // form.group % form.blocks == jnp.arange(form.blocks)[:, None]
        stacked = jnp.where(mine[None, None, :, None, :], stacked[:, :, None], 0)
    return stacked.reshape(-1, form.extent), t


def _weight_spec(block: tuple[int, int], along: bool, stack: bool) -> Any:
    """A block of codes or scales; columns are its last axis where `along`, else its first."""
    if stack:
        at = (lambda n, m, layer: (layer[0], 0, n)) if along else (lambda n, m, layer: (layer[0], n, 0))
        return pl.BlockSpec((None, *block), at)
    return pl.BlockSpec(block, (lambda n, m: (0, n)) if along else (lambda n, m: (n, 0)))


def _rows_of_groups(values: jax.Array, layout: str) -> jax.Array:
    """[groups,N] (stacked: [L,groups,N]); half floats as int16 bits."""
    return _as_bits(values if layout == "kn" else jnp.swapaxes(values, -1, -2))


def _scratch(form: Form, kinds: Sequence[str]) -> list[Any]:
    """Digits and t, sums of digits, and decoded scales and zeros."""
    own = [pltpu.VMEM((form.digit_rows, form.extent), jnp.int8), pltpu.VMEM((form.rows, 1), jnp.float32)]
    sums = pltpu.VMEM((len(form.spans()), form.sums, LANES), jnp.float32)
    decoded = [pltpu.VMEM((form.groups, form.columns), jnp.float32) for kind in kinds if kind != "float32"]
    return own * form.inside + [sums] * (len(kinds) > 1) + decoded


def _step(*refs: Any, form: Form, kinds: Sequence[str], zeros: bool, stack: bool, norm: Norm | None) -> None:
    """One step of the grid (columns, blocks of rows)."""
    left = iter(refs[int(stack) :])
    x_ref = next(left)
    norm = norm and replace(norm, scale=next(left))
    t_ref = None if form.inside else next(left)
    w_ref, coded, o_ref = next(left), [next(left) for _ in kinds], next(left)
    d_ref = next(left) if form.inside else x_ref
    t_ref = next(left) if t_ref is None else t_ref
    sums_ref = next(left) if zeros else None
    if form.inside:
        pl.when(pl.program_id(0) == 0)(lambda: steps.quantize(x_ref, d_ref, t_ref, sums_ref, form, norm))
    elif sums_ref is not None:
        steps.sum_spans(d_ref, sums_ref, form)
    plain = [_decoded(ref, kind, left) for ref, kind in zip(coded, kinds, strict=True)]
    steps.multiply(d_ref, t_ref[...], w_ref, plain[0], plain[1] if zeros else None, sums_ref, o_ref, form)


def _decoded(ref: Any, kind: str, scratch: Iterator[Any]) -> Any:
    """A ref of f32: the block itself, or scratch that its values are written to."""
    if kind == "float32":
        return ref
    held = next(scratch)
    held[...] = steps.half(ref[...]) if kind == "int16" else ref[...].astype(jnp.float32)
    return held


def _name(form: Form, bits: int, width: int, rows: int, kinds: Sequence[str], stack: bool) -> str:
    """Unique by what is compiled: the compiler's dumps are found by it."""
    shape = [f"matmul_w{bits}a{8 * form.digits}", f"{form.extent}x{width}", f"g{form.group}", f"m{rows}"]
    return "_".join([*shape, f"c{form.columns}", *kinds, *["stacked"] * stack, *["nk"] * (form.layout == "nk")])
