"""How caches hold the keys and values of attention: as computed, or narrower, each row with a scale of its own.

One array a value. f16: [...,d], what is too large for it the largest there is. i8: int8[...,d+4], the codes and
then the four bytes of their f32 scale. i4: uint8[...,d/2+4], byte i holds code i (low half) and code i+d/2
(high half), 8 more than they are. A row is code * scale; half a step of rounding reaches the largest.

Programs that may run on a TPU hold i8 as `Split`: a row of d+4 bytes would lie there in twice the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

KINDS = ("float", "f16", "i8", "i4")
"""`float` is as computed."""

_KIND = {"float16": "f16", "int8": "i8", "uint8": "i4"}
_LARGEST = 65504.0  # of f16
STEPS = {"i8": 127.5, "i4": 7.5}
"""Half of what a row's greatest magnitude is cut into."""
_LANES = 128


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("width",))
@dataclass(frozen=True)
class Split:
    """codes int8[n,S,m] of rows of `width`, and a scale a row, f32[n,S], along the lanes: as scores have their keys.

    m is whole lanes: rows of fewer would take as much room, and XLA would turn the array over to pack it.
    """

    codes: jax.Array
    scales: jax.Array
    width: int

    @staticmethod
    def of(x: jax.Array) -> Split:
        """Of values [n,S,d]."""
        whole, scales = codes(x.astype(jnp.float32), STEPS["i8"])
        return Split(to_lanes(whole), scales, x.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        """Of the codes."""
        return self.codes.dtype

    def decoded(self, batch: int) -> jax.Array:
        """f32[b,S,g,d], n being b*g."""
        wide = self.codes[..., : self.width].astype(jnp.float32) * self.scales[..., None]
        return wide.reshape(batch, -1, *wide.shape[1:]).swapaxes(1, 2)


def to_lanes(x: jax.Array) -> jax.Array:
    """x[...,d] with zeros up to whole lanes of a TPU."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _LANES)])


def kind_of(stored: jax.Array) -> str:
    """The kind that an array holds, which its dtype tells."""
    return _KIND.get(stored.dtype.name, "float")


def encode(x: jax.Array, kind: str) -> jax.Array:
    """x[...,d] as stored; d is even for i4."""
    if kind == "float":
        return x
    wide = x.astype(jnp.float32)
    if kind == "f16":
        return jnp.clip(wide, -_LARGEST, _LARGEST).astype(jnp.float16)
    whole, scale = codes(wide, STEPS[kind])
    tail = lax.bitcast_convert_type(scale, jnp.uint8)  # [...,4]
    if kind == "i8":
        return jnp.concatenate([whole, lax.bitcast_convert_type(tail, jnp.int8)], axis=-1)
    low, high = jnp.split((whole + 8).astype(jnp.uint8), 2, axis=-1)
    return jnp.concatenate([low | high << 4, tail], axis=-1)


def codes(x: jax.Array, steps: float) -> tuple[jax.Array, jax.Array]:
    """int8[...,d] and a scale f32[...] a row."""
    most = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(most == 0, 1.0, most / steps)
    most_code = int(steps)  # not one more below zero: the largest number lies on a tie, which would fall either way
    return jnp.clip(jnp.round(x / scale[..., None]), -most_code, most_code).astype(jnp.int8), scale


def decode(stored: jax.Array) -> jax.Array:
    """[...,d] of what `encode` made: f32 of codes, floats as they are."""
    kind = kind_of(stored)
    if kind in ("float", "f16"):
        return stored
    codes, tail = stored[..., :-4], stored[..., -4:]
    scale = lax.bitcast_convert_type(tail, jnp.float32)
    if kind == "i4":
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1).astype(jnp.int8) - 8
    return codes.astype(jnp.float32) * scale[..., None]


def seen(x: jax.Array, kind: str) -> jax.Array:
    """x as attention finds it in a cache of that kind, in x's own dtype."""
    return decode(encode(x, kind)).astype(x.dtype)
