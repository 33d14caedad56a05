"""New rows written into caches where they lie, for TPUs (Pallas): all arrays of a layer and all sequences in one call.

XLA writes each sequence of each array by an op of its own: for sixteen sequences and an int8 cache sixty-four a layer,
some fifth of a decoding step. A grid step here takes the stretch of a sequence that its new rows fall in, and puts
back what else is there.
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

from effc.runtime.kernels import on_tpu

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


def append(
    olds: Sequence[jax.Array], news: Sequence[jax.Array], lengths: jax.Array, *, interpret: bool = False
) -> list[jax.Array]:
    """Each of olds [b*g,S,...] with news [b*g,t,...] of sequence i from row lengths[i] on, dropped past S."""
    batch, count = len(lengths), news[0].shape[1]
    kinds = Counter(f"{old.dtype.name}_{'x'.join(map(str, old.shape))}" for old in olds)
    name = f"append_{'_'.join(f'{n}_{kind}' for kind, n in kinds.items())}_b{batch}_t{count}"
    blocks = [_block(old, batch) for old in olds]
    step = sum(2 * block.size * block.dtype.itemsize for block in blocks)
    stretches = 1 if count == 1 else 2
    on_tpu.note(name, step, batch * stretches)
    # Pinned to HBM: XLA would bring whole caches to VMEM for the attention that follows, and back.
    kept = [_stretch(old, block) for old, block in zip(olds, blocks, strict=True)]
    fresh = [pl.BlockSpec((len(new) // batch, *new.shape[1:]), _whole(new.ndim)) for new in news]
    call = pl.pallas_call(
        functools.partial(_step, capacities=[old.shape[1] for old in olds]),
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


def _step(at: Any, *refs: Any, capacities: Sequence[int]) -> None:
    arrays = len(capacities)
    news, olds, outs = (refs[n * arrays : (n + 1) * arrays] for n in range(3))
    start, j = at[pl.program_id(0)], pl.program_id(1)
    for new, old, out, capacity in zip(news, olds, outs, capacities, strict=True):
        size, rank, wide = old.shape[1], len(old.shape), _WIDE[old.dtype.name]
        place = start - size * _number(start, j, size, capacity)
        rows = lax.broadcasted_iota(jnp.int32, (1, size, 1)[:rank], 1)
        x, value = old[...].astype(wide), new[...].astype(wide)
        for n in range(new.shape[1]):
            x = jnp.where(rows == place + n, value[:, n : n + 1], x)
        out[...] = x.astype(out.dtype)
