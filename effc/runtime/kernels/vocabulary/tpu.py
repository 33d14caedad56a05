"""The two likeliest tokens and log-sum-exp for TPUs (Pallas): logits of a tile of the vocabulary live in VMEM alone.

A step multiplies as the matmul kernel does (coded heads), or in floats, and meanwhile takes the logits of the step
before 128 columns at a time: each lane keeps its own largest and next, where they were, and its own sum of
exponentials. Lanes are merged once, in the last step: a merge a tile would cost as much as a fifth of the product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.generations import GENERATIONS, NO_INT8
from effc.runtime.kernels.matmul import steps, tiling
from effc.runtime.kernels.matmul.steps import Form
from effc.runtime.kernels.matmul.tpu import SCALES
from effc.runtime.kernels.on_tpu import Call
from effc.runtime.kernels.vocabulary.reference import Top
from effc.runtime.qarray import QArray

LANES, SUBLANES = 128, 8

ROWS = 64
"""Rows of x that the kernel takes."""

WIDEST = 4096
"""Columns of a step: their logits are taken one register's width at a time, all unrolled."""

TILE = 4 * 2**20
"""Bytes of a float head in one step."""

HIDDEN = -1e30
"""A logit no token has; its difference to itself is a number."""

_NOTHING = 2**31 - 1


def fits(x: jax.Array, head: jax.Array | QArray, layout: str) -> bool:
    """Whether the kernel takes x[R,K] and that head: floats, or codes one an element in groups along K."""
    few = x.ndim == 2 and 0 < x.shape[0] <= ROWS and x.dtype.name in ("float32", "bfloat16")
    if not isinstance(head, QArray):
        return few and head.ndim == 2 and head.dtype.name in ("float32", "bfloat16")
    extent = x.shape[1]
    group = min(head.group or extent, extent)
    along = (layout, head.axis) in (("kn", -2), ("nk", -1))
    plain = head.codes.ndim == 2 and head.codes.dtype in (jnp.int8, jnp.int4) and head.form == "int"
    known = head.scales.dtype.name in SCALES
    there = on_tpu.generation() not in NO_INT8
    return there and few and along and plain and known and (group == extent or group % 32 == 0)


def top(
    x: jax.Array, head: jax.Array | QArray, *, layout: str = "kn", softcap: float = 0.0, width: int = 0,
    columns: int = 0, interpret: bool = False,
) -> Top:  # fmt: skip
    """As the reference; columns of a step, whole lanes, 0: chosen."""
    product = _coded(x, head, layout, columns) if isinstance(head, QArray) else _plain(x, head, layout, columns)
    form, width = product.form, width or _width(head, layout)
    count = pl.cdiv(width, form.columns)
    name = f"vocabulary_{_sort(head)}_{layout}_{form.extent}x{width}_m{x.shape[0]}_c{form.columns}"
    name += "_capped" * bool(softcap)
    on_tpu.note(Call(name, product.step_bytes, count, int(2 * product.step_bytes)))
    found = pl.pallas_call(
        functools.partial(_step, product=product, softcap=softcap, width=width, count=count),
        name=name,
        grid=(count,),
        in_specs=product.specs,
        out_specs=[pl.BlockSpec((form.rows, 1), lambda n: (0, 0))] * len(_KINDS),
        out_shape=[jax.ShapeDtypeStruct((form.rows, 1), kind) for kind in _KINDS],
        scratch_shapes=[
            pltpu.VMEM((form.rows, form.columns), jnp.float32),
            *[pltpu.VMEM((form.rows, LANES), kind) for kind in _KINDS],
            *product.scratch,
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiling.VMEM[on_tpu.generation()]),
        interpret=interpret,
    )(*product.operands)
    return Top(*(one[: x.shape[0], 0] for one in found))


_KINDS = (jnp.float32, jnp.int32, jnp.float32, jnp.int32, jnp.float32)
"""Of largest, where, next, where, sum: what a lane keeps, and what comes out."""


@dataclass(frozen=True)
class _Product:
    """begin(inputs, scratch) of the first step; multiply(inputs, scratch, logits) of each; step_bytes: what it reads
    from HBM."""

    begin: Callable[[Sequence[Any], Sequence[Any]], None]
    multiply: Callable[[Sequence[Any], Sequence[Any], Any], None]
    form: Form
    operands: list[Any]
    specs: list[Any]
    scratch: list[Any]
    step_bytes: float


def _sort(head: jax.Array | QArray) -> str:
    if not isinstance(head, QArray):
        return head.dtype.name
    return f"{head.codes.dtype.name}_g{head.group}{'' if head.sym else '_zeros'}_{head.scales.dtype.name}"


def _width(head: jax.Array | QArray, layout: str) -> int:
    return head.shape[1 if layout == "kn" else 0]


def _rounded(rows: int) -> int:
    return -(-rows // SUBLANES) * SUBLANES


def _tile(extent: int, columns: int, layout: str) -> pl.BlockSpec:
    """Of a head."""
    if layout == "kn":
        return pl.BlockSpec((extent, columns), lambda n: (0, n))
    return pl.BlockSpec((columns, extent), lambda n: (n, 0))


# -- heads of floats ----------------------------------------------------------------------------------------


def _plain(x: jax.Array, head: jax.Array, layout: str, columns: int) -> _Product:
    rows, extent = x.shape
    each = extent * head.dtype.itemsize
    fitting = min(max(TILE // each // LANES * LANES, LANES), WIDEST, -(-_width(head, layout) // LANES) * LANES)
    form = Form(_rounded(rows), extent, columns or fitting, extent, 1, layout)
    specs = [pl.BlockSpec((form.rows, extent), lambda n: (0, 0)), _tile(extent, form.columns, layout)]
    multiply = functools.partial(_multiply_plain, form=form)
    return _Product(lambda *_: None, multiply, form, [x, head], specs, [], form.columns * each)


def _multiply_plain(inputs: Sequence[Any], scratch: Sequence[Any], logits: Any, *, form: Form) -> None:
    """f32 x by a bf16 head: x as a bf16 and the bf16 of what that left, its rows below."""
    axes = (((1,), (0 if form.layout == "kn" else 1,)), ((), ()))
    x, w = (ref[...] for ref in inputs)
    if w.dtype == jnp.float32 or x.dtype == w.dtype:
        exact = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
        logits[...] = lax.dot_general(x.astype(w.dtype), w, axes, precision=exact, preferred_element_type=jnp.float32)
        return
    high = x.astype(w.dtype)
    both = jnp.concatenate([high, (x - high.astype(jnp.float32)).astype(w.dtype)])
    parts = lax.dot_general(both, w, axes, preferred_element_type=jnp.float32)
    logits[...] = parts[: form.rows] + parts[form.rows :]


# -- coded heads --------------------------------------------------------------------------------------------


def _coded(x: jax.Array, head: QArray, layout: str, columns: int) -> _Product:
    rows, extent = x.shape
    form = Form(_rounded(rows), extent, 0, min(head.group or extent, extent), 2, layout)
    form = replace(form, strip=tiling.strip(form, GENERATIONS[on_tpu.generation()].unit))
    bits = 4 if head.codes.dtype == jnp.int4 else 8
    values = [v for v in (head.scales, head.zeros) if v is not None]
    sizes = [v.dtype.itemsize for v in values]
    chosen = columns or min(tiling.columns(form, _width(head, layout), bits, sizes, on_tpu.generation()), WIDEST)
    form = replace(form, columns=-(-chosen // LANES) * LANES)
    scales = [_by_group(v, layout) for v in values]
    specs = [pl.BlockSpec((form.rows, extent), lambda n: (0, 0)), _tile(extent, form.columns, layout)]
    specs += [pl.BlockSpec((form.groups, form.columns), lambda n: (0, n)) for _ in scales]
    scratch = [pltpu.VMEM((form.digit_rows, extent), jnp.int8), pltpu.VMEM((form.rows, 1), jnp.float32)]
    scratch += [pltpu.VMEM((len(form.spans()), form.sums, LANES), jnp.float32)] * (len(scales) > 1)
    scratch += [pltpu.VMEM((form.groups, form.columns), jnp.float32) for v in scales if v.dtype != jnp.float32]
    begin, multiply = (functools.partial(f, form=form, zeros=len(scales) > 1) for f in (_quantize, _multiply_coded))
    return _Product(begin, multiply, form, [x, head.codes, *scales], specs, scratch, form.tile_bytes(bits, sizes))


def _by_group(values: jax.Array, layout: str) -> jax.Array:
    """[groups,V]; half floats, which the vector unit has not, as int16 bits."""
    values = values if layout == "kn" else values.T
    return lax.bitcast_convert_type(values, jnp.int16) if values.dtype == jnp.float16 else values


def _quantize(inputs: Sequence[Any], scratch: Sequence[Any], *, form: Form, zeros: bool) -> None:
    d_ref, t_ref = scratch[:2]
    steps.quantize(inputs[0], d_ref, t_ref, scratch[2] if zeros else None, form)


def _multiply_coded(inputs: Sequence[Any], scratch: Sequence[Any], logits: Any, *, form: Form, zeros: bool) -> None:
    _, w_ref, *coded = inputs
    refs = iter(scratch)
    d_ref, t_ref = next(refs), next(refs)
    sums_ref = next(refs) if zeros else None
    plain = [_decoded(ref, refs) for ref in coded]
    steps.multiply(d_ref, t_ref[...], w_ref, plain[0], plain[1] if zeros else None, sums_ref, logits, form)


def _decoded(ref: Any, scratch: Iterator[Any]) -> Any:
    """A ref of f32."""
    if ref.dtype == jnp.float32:
        return ref
    held = next(scratch)
    held[...] = steps.half(ref[...]) if ref.dtype == jnp.int16 else ref[...].astype(jnp.float32)
    return held


# -- largest, next, sum ------------------------------------------------------------------------------------


def _step(*refs: Any, product: _Product, softcap: float, width: int, count: int) -> None:
    """One tile of the vocabulary."""
    cuts = [len(product.operands), len(_KINDS), 1, len(_KINDS), len(product.scratch)]
    given, out, (logits,), state, scratch = (refs[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(5))
    at, columns = pl.program_id(0), product.form.columns

    def begin() -> None:
        _nothing(logits, state)
        product.begin(given, scratch)

    def end() -> None:
        if width % columns:
            _hide(logits, width % columns)
        _see(logits, at * (columns // LANES), state)
        _merge(state, out)

    pl.when(at == 0)(begin)
    _see(logits, (at - 1) * (columns // LANES), state)  # of the tile before: it waits for no product of this step
    product.multiply(given, scratch, logits)
    if softcap:  # before columns are hidden: the cap would lift them
        logits[...] = softcap * jnp.tanh(logits[...] / softcap)
    pl.when(at == count - 1)(end)


def _hide(logits: Any, held: int) -> None:
    """What is past the vocabulary's end."""
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits[...] = jnp.where(column < held, logits[...], HIDDEN)


def _nothing(logits: Any, state: Sequence[Any]) -> None:
    logits[...] = jnp.full_like(logits[...], HIDDEN)
    best, place, second, other, total = state
    best[...] = jnp.full_like(best[...], HIDDEN)
    second[...] = jnp.full_like(second[...], HIDDEN)
    place[...] = jnp.zeros_like(place[...])
    other[...] = jnp.zeros_like(other[...])
    total[...] = jnp.zeros_like(total[...])


def _see(logits: Any, first: jax.Array, state: Sequence[Any]) -> None:
    """A tile's logits, a register's width after another; `first` counts these over the whole vocabulary."""
    best, place, second, other, total = (ref[...] for ref in state)
    before, parts = best, range(logits.shape[1] // LANES)
    for c in parts:
        x = _part(logits, c)
        larger, next_ = x > best, x > second
        other = jnp.where(larger, place, jnp.where(next_, first + c, other))
        place = jnp.where(larger, first + c, place)
        second = jnp.maximum(second, jnp.minimum(x, best))
        best = jnp.maximum(x, best)
    total = total * jnp.exp(before - best) + functools.reduce(
        jnp.add, (jnp.exp(_part(logits, c) - best) for c in parts)
    )
    for ref, value in zip(state, (best, place, second, other, total), strict=True):
        ref[...] = value


def _part(logits: Any, c: int) -> jax.Array:
    return logits[:, c * LANES : (c + 1) * LANES]


def _merge(state: Sequence[Any], out: Sequence[Any]) -> None:
    """Of lanes one row each; tokens count along the vocabulary."""
    best, place, second, other, total = (ref[...] for ref in state)
    lane = lax.broadcasted_iota(jnp.int32, best.shape, 1)
    token, after = place * LANES + lane, other * LANES + lane
    most = jnp.max(best, axis=1, keepdims=True)
    winner = jnp.min(jnp.where(best == most, token, _NOTHING), axis=1, keepdims=True)
    mine = token == winner
    rest, where = jnp.where(mine, second, best), jnp.where(mine, after, token)
    following = jnp.max(rest, axis=1, keepdims=True)
    out[0][...], out[1][...], out[2][...] = most, winner, following
    out[3][...] = jnp.min(jnp.where(rest == following, where, _NOTHING), axis=1, keepdims=True)
    out[4][...] = most + jnp.log(jnp.sum(total * jnp.exp(best - most), axis=1, keepdims=True))
