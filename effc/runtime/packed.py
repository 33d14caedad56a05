"""Quantized matrices laid out for native products: `QArray`s whose codes lie as threads read them.

For w[K,N] (or [N,K]) summed over K, columns of N go in panels of 32 and places of K in quads of 4; a panel
is one stretch of memory. Codes are unsigned, 8 or 128 more than those of the `QArray`: up to 4 bits byte
4j+i of a quad's 64 holds column j (low half) and column j+16 (high half) at place i; else 128 bytes, the
first 16 columns and then the others. Columns past N have scale 0. K is a multiple of 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effc.runtime.qarray import QArray

PANEL = 32
"""Columns stored together."""

_WIDEST = 128


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "zeros"),
    meta_fields=("bits", "group", "axis", "extent", "columns"),
)
@dataclass(frozen=True)
class Packed:
    """codes u8[panels,K/4,64 or 128], scales and zeros [panels,ceil(K/group),32]; extent K, columns N.

    axis is -2 for an array [K,N], -1 for [N,K]; group 0 is the whole of K.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    bits: int
    group: int
    axis: int
    extent: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""
        return (self.extent, self.columns) if self.axis == -2 else (self.columns, self.extent)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return 2

    @property
    def layout(self) -> str:
        """How a product reads it: kn or nk."""
        return "kn" if self.axis == -2 else "nk"

    @property
    def piece(self) -> int:
        """Places of a row that share a scale: a group, or the largest part of a wide one."""
        group = self.group or self.extent
        return max(n for n in range(4, min(group, _WIDEST) + 1, 4) if group % n == 0)

    def plain(self) -> QArray:
        """The same as stored in files but for one byte a code."""
        codes = self._quads().transpose(1, 4, 0, 2, 3).reshape(self.extent, -1)[:, : self.columns]
        zeros = None if self.zeros is None else self._as_stored(self._by_group(self.zeros))
        codes, scales = self._as_stored(codes), self._as_stored(self._by_group(self.scales))
        return QArray(codes, scales, zeros, 8, self.group, self.axis, self.shape[-1])

    def _as_stored(self, values: jax.Array) -> jax.Array:
        """[K,N] or [N,K], of [K,N]."""
        return values if self.axis == -2 else values.T

    def _quads(self) -> jax.Array:
        """int8 [panels,K/4,2,16,4] codes."""
        panels, quads, _ = self.codes.shape
        if self.bits > 4:
            return self._signed(self.codes.reshape(panels, quads, 2, 16, 4))
        both = jnp.stack([self.codes & 15, self.codes >> 4], axis=2)
        return self._signed(both.reshape(panels, quads, 2, 16, 4))

    def _signed(self, codes: jax.Array) -> jax.Array:
        return (codes.astype(jnp.int16) - (8 if self.bits <= 4 else 128)).astype(jnp.int8)

    def _by_group(self, values: jax.Array) -> jax.Array:
        """[G,N] of [panels,G,32]."""
        return values.transpose(1, 0, 2).reshape(values.shape[1], -1)[:, : self.columns]

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The array it stands for, computed in f32."""
        return self.plain().dequantize(dtype)

    def rows(self, ids: jax.Array) -> QArray:
        """Rows of a table [V,D] grouped along D: only these rows' codes and scales are read."""
        panel, column = ids // PANEL, ids % PANEL
        half, lane = column // 16, column % 16
        panels, quads, _ = self.codes.shape
        if self.bits > 4:
            codes = self.codes.reshape(panels, quads, 2, 16, 4)[panel, :, half, lane, :]
        else:
            both = self.codes.reshape(panels, quads, 16, 4)[panel, :, lane, :]
            codes = jnp.where(half[..., None, None] == 0, both & 15, both >> 4)
        flat = self._signed(codes.reshape(*ids.shape, self.extent))
        zeros = None if self.zeros is None else self.zeros[panel, :, column]
        return QArray(flat, self.scales[panel, :, column], zeros, 8, self.group, -1, self.extent)


def packable(w: QArray) -> bool:
    """Whether there is such a layout of w."""
    if (
        w.ndim != 2
        or w.form != "int"
        or 0 in w.shape
        or w.axis not in (-1, -2)
        or w.codes.dtype.itemsize != 1
        or w.codes.dtype == jnp.int4
    ):
        return False
    extent = w.shape[w.axis]
    # Whatever is shorter than its group is one group.
    return (
        extent % 4 == 0 and (w.group or extent) % 4 == 0 and str(w.scales.dtype) in ("float32", "float16", "bfloat16")
    )
