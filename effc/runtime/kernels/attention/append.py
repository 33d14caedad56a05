"""New rows written into caches where they lie, for TPUs (Pallas): all arrays of a layer and all sequences in one call.

XLA writes each sequence of each array by an op of its own: for sixteen sequences and an int8 cache sixty-four a layer,
some fifth of a decoding step. A grid step here takes the stretch of a sequence that its new rows fall in, and puts
back what else is there. Rows of a `coded.Split` come as floats and become codes and scales here: that took XLA
nine ops a layer.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effc.runtime import coded
from effc.runtime.coded import Split
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.on_tpu import Call

ROWS, COLUMNS = 32, 128
"""Positions of a step: along sublanes whole registers of any dtype, along lanes of arrays that are a number a row."""

MOST = 16
"""New rows a sequence; they lie in two stretches at most."""

WIDEST = 16384
"""Elements of one position."""

_WIDE = {"int8": jnp.int32, "bfloat16": jnp.float32, "float32": jnp.float32}
"""What is selected: registers of 32 bits."""


def fits(old: jax.Array, count: int, batch: int) -> bool:
    """Whether the kernel writes `count` rows a sequence into old[b*g,S,m] or old[b*g,S]."""
    each = len(old) // batch
    whole = old.ndim == 3 or batch == 1 or each % 8 == 0
    return 0 < count <= MOST and old.dtype.name in _WIDE and whole and old.size // old.shape[1] // batch <= WIDEST


def fits_split(old: Split, count: int, batch: int) -> bool:
    """Whether the kernel makes codes and scales of `count` new rows a sequence."""
    return all(fits(x, count, batch) for x in (old.codes, old.scales))


def append(
    olds: Sequence[jax.Array | Split], news: Sequence[jax.Array], lengths: jax.Array, *, interpret: bool = False
) -> list[Any]:
    """Each of olds [b*g,S,...] with news [b*g,t,...] of sequence i from row lengths[i] on, dropped past S.

    News of a Split are floats.
    """
    count = news[0].shape[1]
    widths = [old.codes.shape[2] if isinstance(old, Split) else 0 for old in olds]
    arrays, tree = jax.tree.flatten(list(olds))
    out = _call(arrays, [_flat(*pair) for pair in zip(news, widths, strict=True)], widths, lengths, count, interpret)
    return jax.tree.unflatten(tree, out)


def _flat(new: jax.Array, width: int) -> jax.Array:
    """As the kernel reads it: of rows to be coded f32[b*g,t*width], heads along sublanes as their scales are."""
    return (
        jnp.pad(new.astype(jnp.float32), [(0, 0)] * 2 + [(0, width - new.shape[2])]).reshape(len(new), -1)
        if width
        else new
    )


def _call(
    olds: Sequence[jax.Array], news: Sequence[jax.Array], widths: Sequence[int], lengths: jax.Array, count: int,
    interpret: bool,
) -> list[jax.Array]:  # fmt: skip
    """`widths` of rows to be coded, each of two arrays, 0 for an array written as it is."""
    batch = len(lengths)
    kinds = Counter(f"{old.dtype.name}_{'x'.join(map(str, old.shape))}" for old in olds)
    name = f"append_{'_'.join(f'{n}_{kind}' for kind, n in kinds.items())}_b{batch}_t{count}"
    name += "_coding" * any(widths)
    blocks = [_block(old, batch) for old in olds]
    step = sum(2 * block.size * block.dtype.itemsize for block in blocks)
    stretches = 1 if count == 1 else 2
    on_tpu.note(Call(name, step, batch * stretches, 2 * step))
    # Pinned to HBM: XLA would bring whole caches to VMEM for the attention that follows, and back.
    kept = [_stretch(old, block) for old, block in zip(olds, blocks, strict=True)]
    fresh = [pl.BlockSpec((len(new) // batch, *new.shape[1:]), _whole(new.ndim)) for new in news]
    call = pl.pallas_call(
        functools.partial(_step, capacities=[old.shape[1] for old in olds], widths=widths, count=count),
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(batch, stretches), in_specs=[*fresh, *kept], out_specs=kept
        ),
        out_shape=[pltpu.HBM(old.shape, old.dtype) for old in olds],
        input_output_aliases={1 + len(news) + n: n for n in range(len(olds))},
        interpret=interpret,
    )
    there = olds if interpret else [pltpu.with_memory_space_constraint(old, pltpu.HBM) for old in olds]
    return list(call(lengths.astype(jnp.int32), *news, *there))


def _block(old: jax.Array, batch: int) -> jax.ShapeDtypeStruct:
    positions = min(ROWS if old.ndim == 3 else COLUMNS, old.shape[1])
    return jax.ShapeDtypeStruct((len(old) // batch, positions, *old.shape[2:]), old.dtype)


def _whole(rank: int) -> Any:
    return lambda i, j, at: (i, *(0,) * (rank - 1))


def _stretch(old: jax.Array, block: jax.ShapeDtypeStruct) -> pl.BlockSpec:
    size, capacity, rest = block.shape[1], old.shape[1], (0,) * (old.ndim - 2)
    return pl.BlockSpec(block.shape, lambda i, j, at: (i, _number(at[i], j, size, capacity), *rest))


def _number(start: jax.Array, j: jax.Array, size: int, capacity: int) -> jax.Array:
    """Of the stretch that step j takes: the last again past it, with the same rows, so that none is lost."""
    return jnp.minimum(lax.div(start, jnp.int32(size)) + j, pl.cdiv(capacity, size) - 1)


def _step(at: Any, *refs: Any, capacities: Sequence[int], widths: Sequence[int], count: int) -> None:
    arrays = len(capacities)
    news, olds, outs = refs[: len(widths)], refs[len(widths) : -arrays], refs[-arrays:]
    start, j = at[pl.program_id(0)], pl.program_id(1)
    places = iter(zip(olds, outs, capacities, strict=True))
    for new, width in zip(news, widths, strict=True):
        values = [_coded(new[:, n * width : (n + 1) * width]) for n in range(count)] if width else []
        for part in range(2 if width else 1):
            old, out, capacity = next(places)
            wide = _WIDE[old.dtype.name]
            rows = [value[part] for value in values] if width else _rows(new[...].astype(wide), count)
            _place(rows, old, out, start, j, capacity, wide)


def _rows(value: jax.Array, count: int) -> list[jax.Array]:
    return [value[:, n : n + 1] for n in range(count)]


def _coded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """i32[g,1,d] and f32[g,1] of f32[g,d], as `coded.Split.of`."""
    codes, scale = coded.codes(x, coded.STEPS["i8"])
    return codes.astype(jnp.int32)[:, None], scale[:, None]


def _place(
    rows: Sequence[jax.Array], old: Any, out: Any, start: jax.Array, j: jax.Array, capacity: int, wide: Any
) -> None:
    """Of one array: the stretch with new rows from `start` on."""
    size, rank = old.shape[1], len(old.shape)
    place = start - size * _number(start, j, size, capacity)
    row = lax.broadcasted_iota(jnp.int32, (1, size, 1)[:rank], 1)
    x = old[...].astype(wide)
    for n, value in enumerate(rows):
        x = jnp.where(row == place + n, value, x)
    out[...] = x.astype(out.dtype)
