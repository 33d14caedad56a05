"""Rows of a table of codes for TPUs (Pallas), read where they lie.

A register holds 32 rows of int8 codes, so XLA, which takes a row by itself, first turns the whole table over, in
every step. A grid step here reads the registers that a row is in, and picks it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.on_tpu import Call

TALL = {"int8": 32, "int4": 64}
"""Rows of a register."""

WIDEST = 32768


def fits(codes: jax.Array) -> bool:
    """Whether the kernel takes rows of codes[V,D], one an element."""
    return codes.ndim == 2 and codes.dtype.name in TALL and codes.shape[1] <= WIDEST


def rows(codes: jax.Array, ids: jax.Array, *, interpret: bool = False) -> jax.Array:
    """As the reference."""
    (vocab, width), count = codes.shape, len(ids)
    tall = min(TALL[codes.dtype.name], vocab)
    name = f"lookup_{codes.dtype.name}_{vocab}x{width}_n{count}"
    size = tall * width * (4 if codes.dtype == jnp.int4 else 8) // 8
    on_tpu.note(Call(name, size + 4 * width, count, 2 * size))
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(count,),
        in_specs=[pl.BlockSpec((tall, width), lambda i, at: (lax.div(at[i], jnp.int32(tall)), 0))],
        out_specs=pl.BlockSpec((1, 1, width), lambda i, at: (i, 0, 0)),
    )  # fmt: skip
    out = pl.pallas_call(
        functools.partial(_step, tall=tall),
        name=name, grid_spec=spec, interpret=interpret,
        out_shape=jax.ShapeDtypeStruct((count, 1, width), jnp.float32),
    )(ids.astype(jnp.int32), codes)  # fmt: skip
    return out[:, 0]


def _step(at: Any, codes: Any, out: Any, *, tall: int) -> None:
    """One row: a sum over all of them, of which one is not zero."""
    row = lax.broadcasted_iota(jnp.int32, (tall, 1), 0)
    mine = row == lax.rem(at[pl.program_id(0)], jnp.int32(tall))
    wide = codes[...].astype(jnp.int8).astype(jnp.float32)
    out[0] = jnp.sum(jnp.where(mine, wide, 0), axis=0, keepdims=True)
