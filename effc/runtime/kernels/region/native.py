"""Functions whose quantized layers run as native regions: cpu.cc, called through jax.ffi."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.runtime.kernels import policy
from effc.runtime.kernels.build import Unbuilt, build
from effc.runtime.kernels.region import form, record
from effc.runtime.kernels.region.program import Program
from effc.runtime.packed import PANEL, Packed, packable
from effc.runtime.qarray import QArray

SOURCE = Path(__file__).with_name("cpu.cc")

VARIANTS = {"avx2": ("-march=x86-64-v3",), "avx512": ("-mno-avx512vnni",), "portable": ("-DEFFC_PORTABLE",)}
"""Values of EFFC_NATIVE that choose less than this processor has, for tests; and the compiler's flags."""


def variant() -> tuple[str, ...]:
    """Flags of the variant that the environment chooses; none: all that the processor has."""
    return VARIANTS.get(os.environ.get("EFFC_NATIVE", ""), ())


def digits() -> int:
    """Bytes an activation is rounded to: 2, or 1 where EFFC_ACTIVATIONS=8."""
    return 1 if os.environ.get("EFFC_ACTIVATIONS") == "8" else 2


@cache
def _library(flags: tuple[str, ...]) -> tuple[str, ctypes.CDLL]:
    """The name the region is registered under, and the library; raises Unbuilt."""
    built = build(SOURCE, flags)
    try:
        library = ctypes.CDLL(str(built.file))
        # The name says which code it is: JAX keeps compiled programs that call it on disk.
        name = f"effc_region_{built.key}"
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library.EffcRegion), platform="cpu")
    except (OSError, AttributeError) as error:
        raise Unbuilt(f"{built.file} does not load: {error}") from None
    return name, library


def target(flags: tuple[str, ...] | None = None) -> str:
    """The name of the native function; raises Unbuilt."""
    return _library(variant() if flags is None else flags)[0]


def library() -> ctypes.CDLL:
    """The shared object of the variant in use; raises Unbuilt."""
    return _library(variant())[1]


def status() -> str:
    """What programs use on this machine, and why."""
    wide = f"activations of {8 * digits()} bits (EFFC_ACTIVATIONS=8 or 16)"
    return policy.status(target, lambda: f"{library_features()}, {wide}, built as {target()}")


def library_features() -> str:
    """The instructions that the variant in use was compiled for, and who chose them."""
    found = library().EffcFeatures
    found.restype = ctypes.c_char_p
    chosen = os.environ.get("EFFC_NATIVE", "")
    return found().decode() + (f" (EFFC_NATIVE={chosen})" if chosen in VARIANTS else "")


def usable() -> bool:
    """Whether programs traced now have native regions; tells once on stderr why they cannot."""
    return policy.usable(target)


def call(program: Program, flags: tuple[str, ...] | None = None) -> Sequence[jax.Array]:
    """Runs a program: its outputs, flat where it does not know their shapes."""
    shapes = [
        jax.ShapeDtypeStruct((slot.size // 4,) if slot.shape is None else slot.shape, slot.dtype)
        for slot in program.outputs
    ]
    run = jax.ffi.ffi_call(target(flags), shapes, input_output_aliases=program.aliases, vmap_method="sequential")
    return run(*program.inputs, program=program.words())


def regions(
    function: Callable[..., Any], flags: tuple[str, ...] | None = None, width: int | None = None
) -> Callable[..., Any]:
    """The same function of arrays; what it does with packed matrices is done in native regions.

    width: bytes an activation is rounded to, 1 or 2; None is what the environment says.
    """

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        if not (has_packed(args) or (has_matrix(leaves) and usable())):
            return function(*args)

        def flat(*leaves: Any) -> Any:
            with record.recording():
                return function(*jax.tree.unflatten(tree, leaves))

        closed, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        results = form.run(closed, leaves, partial(call, flags=flags), digits() if width is None else width)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return run


def has_packed(tree: Any) -> bool:
    """Whether a packed matrix is among the leaves."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Packed))
    return any(isinstance(leaf, Packed) for leaf in leaves)


def has_matrix(leaves: Sequence[Any]) -> bool:
    """Whether some array may be a layer's weights, in floats."""
    return any(getattr(x, "ndim", 0) == 2 and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)


def matmul(x: jax.Array, w: Packed) -> jax.Array:
    """f32 [R,N] from x f32[R,K] and w: one product by itself."""
    return regions(partial(_product, layout=w.layout))(x, w)


@record.recorded
def linear(x: jax.Array, w: Packed, bias: jax.Array | None = None, *, layout: str) -> jax.Array:
    """A product as a layer of its own; its reference."""
    return jax.lax.dot_general(x, w.dequantize(), (((1,), (0 if layout == "kn" else 1,)), ((), ())))


def _product(x: jax.Array, w: Packed, *, layout: str) -> jax.Array:
    return linear(x, w, layout=layout)


def pack(w: QArray) -> Packed | QArray:
    """w laid out for native products, where there is such a layout."""
    if not packable(w):
        return w
    extent, columns = w.shape[w.axis], w.shape[-1 if w.axis == -2 else 0]
    group = 0 if w.group >= extent else w.group
    zeros = None if w.zeros is None else _scales(w.zeros, w.axis, columns)
    codes, scales = _codes(w, extent, columns), _scales(w.scales, w.axis, columns)
    return Packed(codes, scales, zeros, 4 if w.bits <= 4 else 8, group, w.axis, extent, columns)


def packed(params: Any) -> Any:
    """A tree of parameters with its quantized matrices packed, where programs use that."""
    if jax.default_backend() == "tpu":
        from effc.runtime.kernels.matmul import tpu  # Pallas takes half a second to import

        return jax.tree.map(lambda x: tpu.prepared(x) if isinstance(x, QArray) else x, params, is_leaf=_is_coded)
    if not usable():
        return params
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, QArray))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return jax.tree.unflatten(tree, pool.map(lambda x: pack(x) if isinstance(x, QArray) else x, leaves))


def _is_coded(x: Any) -> bool:
    return isinstance(x, QArray)


def _codes(w: QArray, extent: int, columns: int) -> jax.Array:
    out = _aligned((-(-columns // PANEL), extent // 4, 64 if w.bits <= 4 else 128), np.dtype(np.uint8))
    codes = np.ascontiguousarray(w.codes)
    sizes = [ctypes.c_int64(n) for n in (extent, columns, w.bits, w.axis == -2)]
    library().EffcPack(_address(codes), *sizes, _address(out))
    return jax.device_put(out)


def _scales(values: jax.Array, axis: int, columns: int) -> jax.Array:
    stored = np.ascontiguousarray(values)
    groups = stored.shape[axis]
    out = _aligned((-(-columns // PANEL), groups, PANEL), stored.dtype)
    sizes = [ctypes.c_int64(n) for n in (groups, columns, stored.dtype.itemsize, axis == -2)]
    library().EffcPackScales(_address(stored), *sizes, _address(out))
    return jax.device_put(out)


class _Room(threading.local):
    """Large stretches of memory that arrays are cut from: of pages as large as the system has.

    Reading small pages one after another is slower: each must be looked up, and prefetching ends with it.
    """

    chunk = 32 << 20
    left: np.ndarray = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """u8[size] that begins where JAX takes it as it is."""
        size = -(-size // 64) * 64
        if size > self.chunk // 2:
            return _pages(size)[:size]
        if size > len(self.left):
            self.left = _pages(self.chunk)
        out, self.left = self.left[:size], self.left[size:]
        return out


_room = _Room()


def _pages(size: int) -> np.ndarray:
    """Fresh memory from the system, with huge pages asked for where it knows them."""
    if sys.platform != "linux":
        room = np.empty(size + 64, np.uint8)
        return room[-room.ctypes.data % 64 :][:size]
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX takes as it is."""
    size = int(np.prod(shape)) * dtype.itemsize
    return _room.take(size)[:size].view(dtype).reshape(shape)


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
