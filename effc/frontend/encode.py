"""A traced primitive's parameters as IR attributes: plain tuples, words and numbers.

One small function a primitive; what needs none is listed by name. The attributes are the keywords
of `effc.runtime.primitives`, so a primitive missing here has no meaning there and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from effc.ir.core import NAN, Attr
from effc.ir.ops import ELEMENTWISE
from effc.ir.types import FROM_NUMPY

Params = Mapping[str, Any]
Attrs = dict[str, Attr]

IDENTITY = frozenset(
    [
        "stop_gradient",
        "copy",
        "copy_p",
        "sharding_constraint",
        "name",
        "optimization_barrier",
        "mesh_cast",
        "reshard",
    ]
)
"""Primitives that pass their operands on."""

INLINED = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "custom_lin",
        "xla_call",
        "run_state",
    ]
)
"""Primitives that call a jaxpr, which is imported in their place."""


def dtype_name(dtype: Any) -> str:
    """The IR's word for an array dtype; KeyError for one it has none for."""
    return FROM_NUMPY[np.dtype(dtype).name]


def number(value: Any) -> bool | int | float:
    """A literal as a Python number."""
    array = np.asarray(value)
    item = float(str(array[()])) if array.dtype == np.float32 else array.item()
    return NAN if isinstance(item, float) and item != item else item


def _ints(value: Any) -> Attr:
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return tuple(_ints(item) for item in value)
    return int(value)


def _words(*names: str) -> Callable[[Params], Attrs]:
    """Integer parameters kept under their own names."""
    return lambda p: {name: _ints(p[name]) for name in names}


def _convert(p: Params) -> Attrs:
    return {"dtype": dtype_name(p["new_dtype"])}


def _axes(p: Params) -> Attrs:
    return {"axes": _ints(p["axes"])}


def _running(p: Params) -> Attrs:
    out: Attrs = {"axis": int(p["axis"])}
    return out | {"reverse": True} if p["reverse"] else out


def _index(p: Params) -> Attrs:
    (axis,) = p["axes"]
    return {"axis": int(axis), "dtype": dtype_name(p["index_dtype"])}


def _slice(p: Params) -> Attrs:
    out: Attrs = {"start": _ints(p["start_indices"]), "limit": _ints(p["limit_indices"])}
    strides = p["strides"]
    return out if strides is None or all(s == 1 for s in strides) else out | {"strides": _ints(strides)}


def _pad(p: Params) -> Attrs:
    low, high, interior = zip(*p["padding_config"], strict=True) if p["padding_config"] else ((), (), ())
    return {"low": _ints(low), "high": _ints(high), "interior": _ints(interior)}


def _iota(p: Params) -> Attrs:
    return {"dtype": dtype_name(p["dtype"]), "shape": _ints(p["shape"]), "dimension": int(p["dimension"])}


def _preferred(p: Params) -> Attrs:
    wanted = p.get("preferred_element_type")
    return {} if wanted is None else {"dtype": dtype_name(wanted)}


def _dot(p: Params) -> Attrs:
    contract, batch = p["dimension_numbers"]
    out: Attrs = {"contract": _ints(contract)}
    if batch[0]:
        out["batch"] = _ints(batch)
    return out | _preferred(p)


def _ragged(p: Params) -> Attrs:
    numbers = p["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    plain = (
        _ints(contract) == ((1,), (1,)) and not batch[0] and _ints(numbers.lhs_ragged_dimensions) == (0,)
        and _ints(numbers.rhs_group_dimensions) == (0,)
    )  # fmt: skip
    if not plain:
        raise KeyError("ragged_dot with other dimension numbers than [m,k] x [g,k,n]")
    return _preferred(p)


def _word(enum: Any) -> str:
    return str(enum).rsplit(".", 1)[-1].lower()


def _mode(enum: Any) -> str:
    return {"fill_or_drop": "fill", "promise_in_bounds": "promise_in_bounds", "clip": "clip"}.get(
        _word(enum), _word(enum)
    )


def _gather(p: Params) -> Attrs:
    n = p["dimension_numbers"]
    out: Attrs = {
        "offset": _ints(n.offset_dims), "collapsed": _ints(n.collapsed_slice_dims),
        "index_map": _ints(n.start_index_map), "slice_sizes": _ints(p["slice_sizes"]), "mode": _mode(p["mode"]),
    }  # fmt: skip
    if n.operand_batching_dims:
        out["batch"] = (_ints(n.operand_batching_dims), _ints(n.start_indices_batching_dims))
    fill = p.get("fill_value")
    return out if fill is None else out | {"fill": number(fill)}


def _scatter(p: Params) -> Attrs:
    n = p["dimension_numbers"]
    out: Attrs = {
        "window": _ints(n.update_window_dims), "inserted": _ints(n.inserted_window_dims),
        "index_map": _ints(n.scatter_dims_to_operand_dims), "mode": _mode(p["mode"]),
    }  # fmt: skip
    if n.operand_batching_dims:
        out["batch"] = (_ints(n.operand_batching_dims), _ints(n.scatter_indices_batching_dims))
    return out


def _conv(p: Params) -> Attrs:
    n = p["dimension_numbers"]
    return {
        "strides": _ints(p["window_strides"]), "padding": _ints(p["padding"]),
        "lhs_dilation": _ints(p["lhs_dilation"]), "rhs_dilation": _ints(p["rhs_dilation"]),
        "numbers": (_ints(n.lhs_spec), _ints(n.rhs_spec), _ints(n.out_spec)),
        "groups": int(p["feature_group_count"]), "batch_groups": int(p["batch_group_count"]),
    } | _preferred(p)  # fmt: skip


def _round(p: Params) -> Attrs:
    return {"method": "even"} if "even" in str(p["rounding_method"]).lower() else {}


def _broadcast(p: Params) -> Attrs:
    return {"shape": _ints(p["shape"]), "dims": _ints(p["broadcast_dimensions"])}


def _sort(p: Params) -> Attrs:
    return {"dimension": int(p["dimension"]), "num_keys": int(p["num_keys"]), "stable": bool(p["is_stable"])}


def _top_k(p: Params) -> Attrs:
    return {"k": int(p["k"])}


def _squeeze(p: Params) -> Attrs:
    return {}  # imported as a reshape


ENCODE: Mapping[str, Callable[[Params], Attrs]] = {
    "convert_element_type": _convert, "integer_pow": _words("y"), "round": _round,
    "reduce_precision": _words("exponent_bits", "mantissa_bits"),
    "broadcast_in_dim": _broadcast, "reshape": _words("new_sizes"),
    "transpose": _words("permutation"), "rev": _words("dimensions"), "slice": _slice,
    "dynamic_slice": _words("slice_sizes"), "dynamic_update_slice": _words(), "concatenate": _words("dimension"),
    "stack": _words("axis"), "tile": _words("reps"), "split": _words("sizes", "axis"), "pad": _pad, "iota": _iota,
    "reduce_sum": _axes, "reduce_max": _axes, "reduce_min": _axes, "reduce_prod": _axes, "reduce_and": _axes,
    "reduce_or": _axes, "argmax": _index, "argmin": _index, "cumsum": _running, "cumprod": _running,
    "cummax": _running, "cummin": _running, "cumlogsumexp": _running, "sort": _sort, "top_k": _top_k,
    "dot_general": _dot, "ragged_dot_general": _ragged, "gather": _gather, "scatter": _scatter,
    "scatter-add": _scatter, "scatter_add": _scatter, "scatter_mul": _scatter, "scatter_min": _scatter,
    "scatter_max": _scatter, "conv_general_dilated": _conv, "squeeze": _squeeze,
}  # fmt: skip
"""How to read the parameters of every primitive that has any."""

RENAMED = {"scatter-add": "scatter_add", "ragged_dot_general": "ragged_dot"}


def encode(primitive: str, params: Params) -> Attrs | None:
    """The op's attributes, or None for a primitive the IR does not know."""
    if primitive in ENCODE:
        return ENCODE[primitive](params)
    return {} if f"lax.{primitive}" in ELEMENTWISE else None
