"""Attention of a few queries a sequence over its cache, for TPUs (Pallas): codes stay codes up to the matrix unit.

A grid step takes a block of keys of one sequence, all its key/value heads. It works in phases, all scores,
then all of softmax, then all products with values, and reads and writes the running state once: heads would
wait for each other otherwise. Blocks that no query sees are neither read nor computed.

Of an int8 cache both products run on the int8 matrix unit. Queries become two int8 digits a row, as the
matmul kernel's activations do. Weights of values, p times the value's scale, become two digits of 7 bits of
the greatest scale: what is lost is below 2^-14 of the greatest weight. Of a bf16 cache f32 queries and weights
become a bf16 and the bf16 of what that left. Products with an f32 cache are f32.

Heads whose rows fill a part of a register share one (a pack): products are a head's own, their rows are then
picked, and softmax runs once for all of them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.attention import tiling
from effc.runtime.kernels.attention.tiling import SUBLANES, Form
from effc.runtime.kernels.generations import NO_INT8
from effc.runtime.kernels.on_tpu import Call

QUERIES = 16
"""Queries a sequence that the kernel takes."""

WIDEST = 16384
"""Elements of one position, all heads: more leaves too few positions a step."""

VMEM = 64 * 2**20

HIDDEN = -1e30
"""A score no key has; less would give NaN where a whole block is hidden."""

_DIGIT = 128
_WHOLE = 127 * _DIGIT


def fits(q: jax.Array, keys: jax.Array, values: jax.Array, g: int) -> bool:
    """Whether the kernel takes q[b,t,h,d] over keys and values [b*g,S,d]."""
    alike = keys.shape == values.shape and keys.dtype == values.dtype and keys.shape[2] == q.shape[3]
    kinds = keys.dtype.name in ("int8", "bfloat16", "float32") and q.dtype.name in ("bfloat16", "float32")
    few = 0 < q.shape[1] <= QUERIES and q.shape[2] % g == 0
    known = keys.dtype.name != "int8" or on_tpu.generation() not in NO_INT8  # codes are XLA's there
    return alike and kinds and known and few and g * q.shape[3] <= WIDEST and q.shape[3] % SUBLANES == 0


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, scales: tuple[jax.Array, jax.Array] | None,
    positions: jax.Array, sinks: jax.Array | None = None, *,
    scale: float = 1.0, window: int = 0, softcap: float = 0.0, interpret: bool = False, block: int = 0,
) -> jax.Array:  # fmt: skip
    """[b,t,h,d] of q[b,t,h,d] over keys and values [b*g,S,d] and, of int8, scales f32[b,g,S] each."""
    b, t, h, d = q.shape
    g, S = keys.shape[0] // b, keys.shape[1]
    kind = {"int8": "int8", "bfloat16": "bf16"}.get(keys.dtype.name, "f32")
    form = Form(g, t * h // g, d, S, block or S, kind, q.dtype == jnp.float32, scale, window, softcap)
    form = form if block else replace(form, block=tiling.block_of(form, b, on_tpu.generation()))
    rows = q.reshape(b, t, g, h // g, d).swapaxes(1, 2).reshape(b, g, form.rows, d)
    out = _call(form, rows, keys, values, scales, positions, sinks, interpret)
    return out.reshape(b, g, t, h // g, d).swapaxes(1, 2).reshape(b, t, h, d)


def _call(form, q, keys, values, scales, positions, sinks, interpret):  # type: ignore[no-untyped-def]
    b, steps = q.shape[0], pl.cdiv(form.keys, form.block)
    name = _name(form, b)
    on_tpu.note(Call(name, tiling.step_bytes(form), b * steps, tiling.vmem(form), times=b, conditional=True))
    extra = [] if sinks is None else [_sinks(form, sinks)]
    cache = pl.BlockSpec((form.heads, form.block, form.width), lambda i, j, at: (i, _clamped(i, j, at), 0))
    coded = pl.BlockSpec((1, form.heads, form.block), lambda i, j, at: (i, 0, _clamped(i, j, at)))
    own = pl.BlockSpec((1, form.heads, form.rows, form.width), lambda i, j, at: (i, 0, 0, 0))
    place = pl.BlockSpec((1, form.tall, 1), lambda i, j, at: (i, 0, 0))
    sunk = pl.BlockSpec((form.packs, form.tall, 1), lambda i, j, at: (0, 0, 0))
    return pl.pallas_call(
        functools.partial(_body, form=form, sunk=bool(extra)),
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, steps),
            in_specs=[place, own, cache, cache, *[coded] * (2 if scales else 0), *[sunk] * len(extra)],
            out_specs=own,
            scratch_shapes=_scratch(form),
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM, dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(_bounds(form, positions), _places(form, positions), q, keys, values, *(scales or ()), *extra)


def _name(form: Form, batch: int) -> str:
    sort = f"{form.kind}{'' if form.wide else '_narrow'}{'_window' if form.window else ''}"
    sort += "_capped" if form.softcap else ""
    return f"attention_{sort}_g{form.heads}_r{form.rows}_d{form.width}_s{form.keys}_b{batch}_k{form.block}"


def _scratch(form: Form) -> list[Any]:
    rows, n = form.tall, form.packs
    state = [pltpu.VMEM((n, rows, 1), jnp.float32)] * 2 + [pltpu.VMEM((n, rows, form.width), jnp.float32)]
    return [pltpu.VMEM((n, form.digits * rows, form.width), form.dtype), pltpu.VMEM((n, rows, 1), jnp.float32), *state]


def _bounds(form: Form, positions: jax.Array) -> jax.Array:
    """i32[b,2]: the first and the last block of keys that a sequence's queries see."""
    last = jnp.minimum(positions.max(axis=1) // form.block, pl.cdiv(form.keys, form.block) - 1)
    first = jnp.maximum(positions.min(axis=1) - form.window + 1, 0) // form.block if form.window else 0 * last
    return jnp.stack([jnp.minimum(first, last), last], axis=1).astype(jnp.int32)


def _places(form: Form, positions: jax.Array) -> jax.Array:
    """i32[b,tall,1]: the position of each row of a pack."""
    t = positions.shape[1]
    each = jnp.repeat(positions, form.rows // t, axis=1)
    packed = jnp.tile(each, (1, form.pack))
    return jnp.pad(packed, ((0, 0), (0, form.tall - packed.shape[1])))[:, :, None]


def _sinks(form: Form, sinks: jax.Array) -> jax.Array:
    """f32[packs,tall,1] of one score a query head."""
    r = sinks.shape[0] // form.heads
    each = jnp.tile(sinks.astype(jnp.float32).reshape(form.heads, 1, r), (1, form.rows // r, 1))
    packed = each.reshape(form.packs, form.pack * form.rows)
    return jnp.pad(packed, ((0, 0), (0, form.tall - packed.shape[1])))[:, :, None]


def _clamped(i, j, at):  # type: ignore[no-untyped-def]
    """The block that step j reads: one already there where it has nothing to do."""
    return jnp.clip(j, at[i, 0], at[i, 1])


def _body(at, place, q, keys, values, *rest, form: Form, sunk: bool) -> None:  # type: ignore[no-untyped-def]
    scales, rest = (rest[:2], rest[2:]) if form.kind == "int8" else ((), rest)
    sinks, rest = (rest[0], rest[1:]) if sunk else (None, rest)
    out, parts, unit, most, total, sums = rest
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == at[i, 0])
    def _() -> None:
        _begin(form, q, sinks, parts, unit, most, total, sums)

    @pl.when((j >= at[i, 0]) & (j <= at[i, 1]))
    def _() -> None:
        _step(form, j, place[0], keys, values, scales, parts, unit, (most, total, sums))

    @pl.when(j == at[i, 1])
    def _() -> None:
        for pack in range(form.packs):
            done = sums[pack] / total[pack]
            for p in range(form.pack):
                own = done[p * form.rows : (p + 1) * form.rows]
                out[0, pack * form.pack + p] = own.astype(out.dtype)


def _begin(form: Form, q, sinks, parts, unit, most, total, sums) -> None:  # type: ignore[no-untyped-def]
    """Queries as operands, scale and all; the state of no key."""
    for pack in range(form.packs):
        mine = [q[0, pack * form.pack + p].astype(jnp.float32) for p in range(form.pack)]
        rest = form.tall - form.pack * form.rows
        mine += [jnp.zeros((rest, form.width), jnp.float32)] * bool(rest)
        x = jnp.concatenate(mine) if len(mine) > 1 else mine[0]
        parts[pack], unit[pack] = _operand(form, x * form.scale)
        most[pack] = jnp.full((form.tall, 1), HIDDEN) if sinks is None else sinks[pack]
        total[pack] = jnp.full((form.tall, 1), 0.0 if sinks is None else 1.0)
        sums[pack] = jnp.zeros((form.tall, form.width), jnp.float32)


def _operand(form: Form, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x[rows,d] as digits [digits*rows,d], and what the result is to be multiplied by, f32[rows,1]."""
    one = jnp.ones((x.shape[0], 1), jnp.float32)
    if form.kind != "int8":
        return _split(form, x), one
    unit = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / _WHOLE
    whole = jnp.round(x / jnp.where(unit == 0, 1, unit))
    high = jnp.round(whole / _DIGIT)
    return jnp.concatenate([high, whole - _DIGIT * high]).astype(jnp.int8), unit


def _split(form: Form, x: jax.Array) -> jax.Array:
    """Floats as operands: as they are, or a bf16 and the bf16 of what it left."""
    high = x.astype(form.dtype)
    if form.digits == 1:
        return high
    return jnp.concatenate([high, (x - high.astype(jnp.float32)).astype(form.dtype)])


def _joined(form: Form, x: jax.Array) -> jax.Array:
    """f32[rows,n] of products [digits*rows,n]."""
    if form.digits == 1:
        return x
    high, low = x[: form.tall], x[form.tall :]
    return (high * _DIGIT + low).astype(jnp.float32) if form.kind == "int8" else high + low


def _dot(form: Form, x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    exact = lax.Precision.HIGHEST if form.kind == "f32" else None
    wanted = jnp.int32 if form.kind == "int8" else jnp.float32
    axes = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=exact, preferred_element_type=wanted)


def _picked(form: Form, of: list[jax.Array], axes: int = 1) -> jax.Array:
    """Rows of a pack, each head's from its own; `axes` digits lie one after another."""
    if len(of) == 1:
        return of[0]
    row = lax.broadcasted_iota(jnp.int32, (form.tall * axes, 1), 0) % form.tall
    out = of[-1]
    for p in range(len(of) - 2, -1, -1):
        out = jnp.where(row < (p + 1) * form.rows, of[p], out)
    return out


def _step(form: Form, j, place, keys, values, scales, parts, unit, state) -> None:  # type: ignore[no-untyped-def]
    """The phases, each for all packs."""
    most, total, sums = state
    before = [(most[n], total[n], sums[n]) for n in range(form.packs)]
    key = j * form.block + lax.broadcasted_iota(jnp.int32, (form.tall, form.block), 1)
    seen = key <= place
    seen = seen & (key > place - form.window) if form.window else seen
    seen = seen & (key < form.keys) if form.ragged else seen
    scores = [_scores(form, n, keys, scales, parts, unit, seen) for n in range(form.packs)]
    soft = [_softmax(s, seen, was[0], was[1]) for s, was in zip(scores, before, strict=True)]
    there = [_filled(form, j, values[h]) for h in range(form.heads)]
    added = [_weighed(form, n, soft[n][3], seen, there, scales) for n in range(form.packs)]
    for n in range(form.packs):
        now, shrink, sum_, _ = soft[n]
        most[n], total[n], sums[n] = now, sum_, before[n][2] * shrink + added[n]


def _heads(form: Form, pack: int) -> range:
    return range(pack * form.pack, (pack + 1) * form.pack)


def _scores(form: Form, pack: int, keys, scales, parts, unit, seen) -> jax.Array:  # type: ignore[no-untyped-def]
    """f32[tall,block], HIDDEN where a query sees no key."""
    x = parts[pack]
    s = _joined(form, _picked(form, [_dot(form, x, keys[h], 1) for h in _heads(form, pack)], form.digits))
    if form.kind == "int8":
        s = s * unit[pack] * _picked(form, [scales[0][0, h : h + 1, :] for h in _heads(form, pack)])
    s = form.softcap * jnp.tanh(s / form.softcap) if form.softcap else s
    return jnp.where(seen, s, HIDDEN)


def _softmax(s: jax.Array, seen: jax.Array, most: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
    """The greatest score so far, what older sums shrink by, the sum of weights, and weights f32[tall,block]."""
    now = jnp.maximum(most, jnp.max(s, axis=1, keepdims=True))
    weights = jnp.exp(s - now)
    shrink = jnp.exp(most - now)
    return now, shrink, total * shrink + jnp.sum(weights, axis=1, keepdims=True), weights


def _weighed(form: Form, pack: int, weights: jax.Array, seen, values, scales) -> jax.Array:  # type: ignore[no-untyped-def]
    """f32[tall,d]: sums of values."""
    mine = values[pack * form.pack : (pack + 1) * form.pack]
    if form.kind == "int8":
        weights = weights * _picked(form, [scales[1][0, h : h + 1, :] for h in _heads(form, pack)])
        return _weighed_codes(form, jnp.where(seen, weights, 0) if form.ragged else weights, mine)
    x = _split(form, weights)
    return _joined(form, _picked(form, [_dot(form, x, v, 0) for v in mine], form.digits))


def _weighed_codes(form: Form, weights: jax.Array, codes: list[jax.Array]) -> jax.Array:
    most = jnp.max(weights, axis=1, keepdims=True)
    whole = (weights * (_WHOLE / jnp.where(most == 0, 1, most)) + 0.5).astype(jnp.int32)
    x = jnp.concatenate([whole >> 7, whole & 127]).astype(jnp.int8)
    part = _picked(form, [_dot(form, x, v, 0) for v in codes], 2).astype(jnp.float32)
    return (part[: form.tall] * _DIGIT + part[form.tall :]) * (most / _WHOLE)


def _filled(form: Form, j: jax.Array, values: jax.Array) -> jax.Array:
    """Floats with zeros for rows past the last, which may hold anything; codes are always finite."""
    if not form.ragged or form.kind == "int8":
        return values
    key = j * form.block + lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where(key < form.keys, values, 0)
