"""What each `lax.*` op of the IR computes, under its own name: `primitives.dot_general(x, y, ...)`.

Keywords are the IR op's attributes with sizes made concrete, in plain tuples, words and numbers.
Most names are jax.lax's own function; the rest adapt a keyword form to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

Ints = Sequence[int]

_PLAIN = """
add sub mul div rem max min pow atan2 nextafter eq ne lt le gt ge neg sign floor ceil abs exp exp2 expm1
log log1p tanh logistic sin cos tan asin acos atan sinh cosh asinh acosh atanh sqrt rsqrt cbrt erf erfc
erf_inv is_finite square clamp population_count shift_left shift_right_logical shift_right_arithmetic
real imag conj lgamma digamma clz
""".split()  # noqa: SIM905

_BITWISE = {"and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor, "not": lax.bitwise_not}


def dtype_of(name: str) -> jnp.dtype:
    """The array dtype of the IR's short name."""
    return jnp.dtype(_DTYPES[name])


_DTYPES = {
    "f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16",
    "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2", "f8e8m0": "float8_e8m0fnu",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "i4": "int4",
    "u64": "uint64", "u32": "uint32", "u16": "uint16", "u8": "uint8", "u4": "uint4", "bool": "bool",
}  # fmt: skip


def _stretch(function: Callable[..., Array]) -> Callable[..., Array]:
    """Elementwise `function` whose operands of equal rank stretch where a size is 1."""

    def call(*operands: Array, **attrs: object) -> Array:
        shapes = [jnp.shape(x) for x in operands if jnp.ndim(x)]
        if len(set(shapes)) > 1:
            shape = jnp.broadcast_shapes(*shapes)
            operands = tuple(jnp.broadcast_to(x, shape) if jnp.ndim(x) else x for x in operands)
        return function(*operands, **attrs)

    return call


def convert_element_type(x: Array, *, dtype: str) -> Array:
    """x in another dtype."""
    return lax.convert_element_type(x, dtype_of(dtype))


def integer_pow(x: Array, *, y: int) -> Array:
    """x to a whole power."""
    return lax.integer_pow(x, y)


def select_n(which: Array, *cases: Array) -> Array:
    """cases[which], element by element; a scalar `which` chooses a whole case."""
    shape = jnp.broadcast_shapes(*(jnp.shape(case) for case in cases))
    if jnp.ndim(which):
        shape = jnp.broadcast_shapes(shape, jnp.shape(which))
        which = jnp.broadcast_to(which, shape)
    return lax.select_n(which, *(jnp.broadcast_to(case, shape) for case in cases))


def round(x: Array, *, method: str = "away") -> Array:
    """To whole numbers; ties away from zero, or to even."""
    ties = lax.RoundingMethod.TO_NEAREST_EVEN if method == "even" else lax.RoundingMethod.AWAY_FROM_ZERO
    return lax.round(x, ties)


def reduce_precision(x: Array, *, exponent_bits: int, mantissa_bits: int) -> Array:
    """x rounded to fewer bits."""
    return lax.reduce_precision(x, exponent_bits, mantissa_bits)


def broadcast_in_dim(x: Array, *, shape: Ints, dims: Ints) -> Array:
    """x with its axes at `dims` of `shape`."""
    return lax.broadcast_in_dim(x, tuple(shape), tuple(dims))


def reshape(x: Array, *, new_sizes: Ints) -> Array:
    """x in another shape, elements in row-major order."""
    return lax.reshape(x, tuple(new_sizes))


def transpose(x: Array, *, permutation: Ints) -> Array:
    """Axis i of the result is axis permutation[i] of x."""
    return lax.transpose(x, tuple(permutation))


def rev(x: Array, *, dimensions: Ints) -> Array:
    """x backwards along `dimensions`."""
    return lax.rev(x, tuple(dimensions))


def slice(x: Array, *, start: Ints, limit: Ints, strides: Ints | None = None) -> Array:
    """x[start:limit:strides] on every axis."""
    return lax.slice(x, tuple(start), tuple(limit), None if strides is None else tuple(strides))


def dynamic_slice(x: Array, *starts: Array, slice_sizes: Ints) -> Array:
    """A window of x at `starts`, moved inwards where it would stick out."""
    return lax.dynamic_slice(x, starts, tuple(slice_sizes))


def dynamic_update_slice(x: Array, update: Array, *starts: Array) -> Array:
    """x with `update` written at `starts`."""
    return lax.dynamic_update_slice(x, update, starts)


def concatenate(*parts: Array, dimension: int) -> Array:
    """parts one after the other along `dimension`."""
    return lax.concatenate(parts, dimension)


def stack(*parts: Array, axis: int) -> Array:
    """parts along a new axis."""
    return jnp.stack(parts, axis)


def tile(x: Array, *, reps: Ints) -> Array:
    """x repeated `reps` times on each axis."""
    return jnp.tile(x, tuple(reps))


def split(x: Array, *, sizes: Ints, axis: int) -> Sequence[Array]:
    """x cut into pieces of these sizes."""
    return lax.split(x, tuple(sizes), axis)


def pad(x: Array, value: Array, *, low: Ints, high: Ints, interior: Ints) -> Array:
    """x with `value` around and between; negative widths cut."""
    return lax.pad(x, value, tuple(zip(low, high, interior, strict=True)))


def iota(*, dtype: str, shape: Ints, dimension: int) -> Array:
    """0, 1, 2 ... along `dimension`."""
    return lax.broadcasted_iota(dtype_of(dtype), tuple(shape), dimension)


def reduce_sum(x: Array, *, axes: Ints) -> Array:
    """Sum over `axes`."""
    return lax.reduce_sum(x, tuple(axes))


def reduce_max(x: Array, *, axes: Ints) -> Array:
    """Maximum over `axes`."""
    return lax.reduce_max(x, tuple(axes))


def reduce_min(x: Array, *, axes: Ints) -> Array:
    """Minimum over `axes`."""
    return lax.reduce_min(x, tuple(axes))


def reduce_prod(x: Array, *, axes: Ints) -> Array:
    """Product over `axes`."""
    return lax.reduce_prod(x, tuple(axes))


def reduce_and(x: Array, *, axes: Ints) -> Array:
    """Whether all are true over `axes`."""
    return lax.reduce_and(x, tuple(axes))


def reduce_or(x: Array, *, axes: Ints) -> Array:
    """Whether any is true over `axes`."""
    return lax.reduce_or(x, tuple(axes))


def argmax(x: Array, *, axis: int, dtype: str) -> Array:
    """Index of the first maximum along `axis`."""
    return lax.argmax(x, axis, dtype_of(dtype))


def argmin(x: Array, *, axis: int, dtype: str) -> Array:
    """Index of the first minimum along `axis`."""
    return lax.argmin(x, axis, dtype_of(dtype))


def cumsum(x: Array, *, axis: int, reverse: bool = False) -> Array:
    """Running sum."""
    return lax.cumsum(x, axis, reverse)


def cumprod(x: Array, *, axis: int, reverse: bool = False) -> Array:
    """Running product."""
    return lax.cumprod(x, axis, reverse)


def cummax(x: Array, *, axis: int, reverse: bool = False) -> Array:
    """Running maximum."""
    return lax.cummax(x, axis, reverse)


def cummin(x: Array, *, axis: int, reverse: bool = False) -> Array:
    """Running minimum."""
    return lax.cummin(x, axis, reverse)


def cumlogsumexp(x: Array, *, axis: int, reverse: bool = False) -> Array:
    """Running log of a sum of exponentials."""
    return lax.cumlogsumexp(x, axis, reverse)


def sort(*operands: Array, dimension: int, num_keys: int = 1, stable: bool = True) -> tuple[Array, ...]:
    """operands in the order of the first `num_keys` of them."""
    return tuple(lax.sort(operands, dimension, stable, num_keys))


def top_k(x: Array, *, k: int) -> Sequence[Array]:
    """The k largest of the last axis and their indices."""
    return lax.top_k(x, k)


def dot_general(
    x: Array,
    y: Array,
    *,
    contract: Sequence[Ints],
    batch: Sequence[Ints] = ((), ()),
    dtype: str | None = None,
) -> Array:
    """Sum of products over the contracted axes; result axes are batch, x's free, y's free."""
    numbers = ((tuple(contract[0]), tuple(contract[1])), (tuple(batch[0]), tuple(batch[1])))
    wanted = None if dtype is None else dtype_of(dtype)
    return lax.dot_general(x, y, numbers, preferred_element_type=wanted)


def ragged_dot(x: Array, y: Array, group_sizes: Array, *, dtype: str | None = None) -> Array:
    """x[m,k] @ y[g,k,n], rows of x in groups of `group_sizes`."""
    return lax.ragged_dot(x, y, group_sizes, preferred_element_type=None if dtype is None else dtype_of(dtype))


def gather(
    x: Array, indices: Array, *, offset: Ints, collapsed: Ints, index_map: Ints, slice_sizes: Ints, mode: str,
    batch: Sequence[Ints] = ((), ()), fill: float | int | None = None,
) -> Array:  # fmt: skip
    """Slices of x at `indices`, as lax.gather."""
    numbers = lax.GatherDimensionNumbers(
        tuple(offset), tuple(collapsed), tuple(index_map), tuple(batch[0]), tuple(batch[1])
    )
    return lax.gather(x, indices, numbers, tuple(slice_sizes), mode=mode, fill_value=fill)


def _scatter(function: Callable[..., Array]) -> Callable[..., Array]:
    def call(
        x: Array, indices: Array, updates: Array, *, window: Ints, inserted: Ints, index_map: Ints, mode: str,
        batch: Sequence[Ints] = ((), ()),
    ) -> Array:  # fmt: skip
        numbers = lax.ScatterDimensionNumbers(
            tuple(window), tuple(inserted), tuple(index_map), tuple(batch[0]), tuple(batch[1])
        )
        return function(x, indices, updates, numbers, mode=mode)

    return call


def conv_general_dilated(
    x: Array, kernel: Array, *, strides: Ints, padding: Sequence[Ints], lhs_dilation: Ints, rhs_dilation: Ints,
    numbers: Sequence[Ints], groups: int, batch_groups: int = 1, dtype: str | None = None,
) -> Array:  # fmt: skip
    """Convolution, as lax.conv_general_dilated."""
    layout = lax.ConvDimensionNumbers(*(tuple(spec) for spec in numbers))
    pads = [(low, high) for low, high in padding]
    return lax.conv_general_dilated(
        x, kernel, tuple(strides), pads, tuple(lhs_dilation), tuple(rhs_dilation), layout, groups, batch_groups,
        preferred_element_type=None if dtype is None else dtype_of(dtype),
    )  # fmt: skip


LAX: dict[str, Callable[..., object]] = {name: _stretch(getattr(lax, name)) for name in _PLAIN}
LAX |= {name: _stretch(function) for name, function in _BITWISE.items()}
LAX |= {
    function.__name__: function
    for function in (
        convert_element_type, integer_pow, select_n, round, reduce_precision, broadcast_in_dim, reshape,
        transpose, rev, slice, dynamic_slice, dynamic_update_slice, concatenate, stack, tile, split, pad, iota,
        reduce_sum, reduce_max, reduce_min, reduce_prod, reduce_and, reduce_or, argmax, argmin, cumsum, cumprod,
        cummax, cummin, cumlogsumexp, sort, top_k, dot_general, ragged_dot, gather, conv_general_dilated,
    )
}  # fmt: skip
LAX |= {
    "scatter": _scatter(lax.scatter), "scatter_add": _scatter(lax.scatter_add),
    "scatter_mul": _scatter(lax.scatter_mul), "scatter_min": _scatter(lax.scatter_min),
    "scatter_max": _scatter(lax.scatter_max),
}  # fmt: skip
"""Every `lax.NAME` op of the IR by NAME."""


def scan(
    body: Callable[..., tuple[Array, ...]],
    *operands: Array,
    consts: int,
    carry: int,
    length: int,
    reverse: bool,
) -> tuple[Array, ...]:
    """lax.scan over leading axes: operands are constants, then the first carry, then what is scanned."""
    fixed, first, xs = operands[:consts], operands[consts : consts + carry], operands[consts + carry :]

    def step(state: tuple[Array, ...], x: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        out = body(*fixed, *state, *x)
        return tuple(out[:carry]), tuple(out[carry:])

    state, ys = jax.lax.scan(step, tuple(first), tuple(xs), length, reverse)
    return (*state, *ys)
