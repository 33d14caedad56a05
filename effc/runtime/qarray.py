"""Quantized arrays: codes, a scale (and perhaps a zero point) per group along one axis.

`x ~ (code - zero) * scale`; a code is a whole number, or stands for a value (`effc.runtime.forms`, which also
says how codes lie in files). The element at place k of the grouped axis belongs to group k // group,
so the last group is short where the axis is not a multiple of the group; codes are never padded.

Held in memory: `codes` has the array's own shape: int8 for 5 to 8 bits; for 2 to 4 bits
uint8 with two codes a byte along the last axis, element 2j in the low four bits of byte j and
element 2j+1 in the high four, each two's complement; an odd last axis leaves the last high half 0.
`scales` (f32, f16, bf16, powers of two: f8e8m0; prepared for a TPU, f16 are int16 by their bits) has
ceil(K / group) in place of K; `zeros`, where there are any, is like it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effc.runtime.forms import CODEBOOKS, FLOATS, pack


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "zeros"),
    meta_fields=("bits", "group", "axis", "width", "form"),
)
@dataclass(frozen=True)
class QArray:
    """codes [..,K,N] (packed), scales [..,ceil(K/group),N] where axis is -2; axis -1 likewise.

    width is the unpacked length of the last axis; group 0 is the whole axis.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    bits: int
    group: int
    axis: int
    width: int
    form: str = "int"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""
        return (*self.codes.shape[:-1], self.width)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def sym(self) -> bool:
        """Whether there are no zero points."""
        return self.zeros is None

    def unpacked(self) -> jax.Array:
        """int8 codes, one an element. (Prepared for a TPU, 4-bit codes are an int4 array, one an element.)"""
        packed = self.bits <= 4 and self.codes.dtype != jnp.int4
        return unpack(self.codes, self.width) if packed else self.codes[..., : self.width].astype(jnp.int8)

    def dequantize(self, dtype: Any = jnp.float32, codes: jax.Array | None = None) -> jax.Array:
        """The array it stands for, computed in f32; codes: as f32, where they are known."""
        values = self._values() if codes is None else codes
        if self.zeros is not None:
            values = values - self._spread(self.zeros)
        return (values * self._spread(self.scales)).astype(dtype)

    def _spread(self, values: jax.Array) -> jax.Array:
        """f32, one an element."""
        kept = values[..., : self.width] if self.axis == -2 else values  # prepared for a TPU, columns are padded
        return spread_groups(floats(kept), group=self.group, axis=self.axis, extent=self.shape[self.axis])

    def _values(self) -> jax.Array:
        """What each code stands for, f32."""
        codes = self.unpacked()
        if self.form in FLOATS:
            return jax.lax.bitcast_convert_type(codes, FLOATS[self.form]).astype(jnp.float32)
        if self.form in CODEBOOKS:
            return jnp.take(jnp.asarray(CODEBOOKS[self.form]), codes & 15, axis=0)
        return codes.astype(jnp.float32)

    def rows(self, ids: jax.Array) -> QArray:
        """Rows of a table [V,D] grouped along D: only these rows' codes and scales are read."""
        zeros = None if self.zeros is None else jnp.take(self.zeros, ids, axis=0)
        codes, scales = jnp.take(self.codes, ids, axis=0), jnp.take(self.scales, ids, axis=0)
        return replace(self, codes=codes, scales=scales, zeros=zeros)

    def plain(self) -> QArray:
        """Prepared for a TPU, it has columns to whole lanes and halves as their bits; here it is without."""
        if self.scales.dtype != jnp.int16 and self.codes.shape[-1] <= self.width:
            return self
        halves = self.scales.dtype == jnp.int16
        values = [_halves(v) if halves and v is not None else v for v in (self.scales, self.zeros)]
        scales, zeros = (v if v is None or self.axis == -1 else v[..., : self.width] for v in values)
        assert scales is not None
        return replace(self, codes=self.codes[..., : self.width], scales=scales, zeros=zeros)


def floats(values: jax.Array) -> jax.Array:
    """f32 of scales or zero points; int16 are half floats by their bits."""
    return (_halves(values) if values.dtype == jnp.int16 else values).astype(jnp.float32)


def _halves(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float16)


def spread_groups(values: jax.Array, *, group: int, axis: int, extent: int) -> jax.Array:
    """One value an element of the grouped axis, from one a group."""
    count = values.shape[axis]
    if count == 1:
        return values
    shape = list(values.shape)
    shape.insert(len(shape) + axis + 1, group)
    wide = jnp.broadcast_to(jnp.expand_dims(values, len(shape) + axis), shape)
    flat = list(values.shape)
    flat[axis] = count * group
    return jax.lax.slice_in_dim(wide.reshape(flat), 0, extent, axis=values.ndim + axis)


def unpack(packed: jax.Array, width: int) -> jax.Array:
    """int8 codes [..,width] from bytes [..,ceil(width/2)]."""
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    low, high = jnp.left_shift(signed, 4) >> 4, signed >> 4
    both = jnp.stack([low, high], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    return both[..., :width]


__all__ = ["QArray", "pack", "spread_groups", "unpack"]
