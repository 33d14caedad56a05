"""The kernel in cpu.cc, called through jax.ffi: up to FEW rows times a quantized matrix, in f32.

Codes are widened in registers (AVX-512, else what the compiler makes of plain loops), so they are
read once and nothing is written but the result. XLA's thread pool shares the work. `effc.runtime.quantized`
calls this where it can run; EFFC_NATIVE=0 in the environment keeps everything on XLA.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

from effc.runtime.kernels.build import Unbuilt, build
from effc.runtime.kernels.policy import portable as portable
from effc.runtime.kernels.policy import status as told
from effc.runtime.kernels.policy import usable
from effc.runtime.qarray import QArray

FEW = 32
"""Rows that the kernel takes."""

SOURCE = Path(__file__).with_name("cpu.cc")


def fits(x: jax.Array, w: QArray, layout: str) -> bool:
    """Whether the kernel computes x @ w: few rows, one matrix, grouped along the axis that is summed over."""
    rows, extent = x.shape
    axis = -2 if layout == "kn" else -1
    return 0 < rows <= FEW and extent > 0 and w.ndim == 2 and w.axis == axis and 0 not in w.shape


def available() -> bool:
    """Whether programs traced now call the kernel; tells once on stderr why it cannot be had."""
    return usable(target)


def status() -> str:
    """What programs use on this machine, and why."""
    return told(target, lambda: f"built ({target()})")


@cache
def target(*flags: str) -> str:
    """The name the kernel, compiled with these flags too, is registered under; raises Unbuilt."""
    built = build(SOURCE, flags)
    try:
        function = ctypes.CDLL(str(built.file)).EffcMatmul
    except (OSError, AttributeError) as error:
        raise Unbuilt(f"{built.file} does not load: {error}") from None
    # The name says which code it is: JAX keeps compiled programs that call it on disk.
    name = f"effc_matmul_{built.key}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return name


def matmul(x: jax.Array, w: QArray, layout: str, *, flags: tuple[str, ...] = ()) -> jax.Array:
    """f32 [R,N] from x [R,K] and w[K,N] (layout nk: w[N,K])."""
    outputs = w.shape[-1] if layout == "kn" else w.shape[0]
    call = jax.ffi.ffi_call(
        target(*flags), jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32), vmap_method="sequential"
    )
    arrays = [w.codes, w.scales] if w.zeros is None else [w.codes, w.scales, w.zeros]
    return call(x.astype(jnp.float32), *arrays, bits=w.bits, group=w.group or x.shape[1], kn=layout == "kn")
