"""Elementwise arithmetic on literals, only where the answer is the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16 and the 8-bit floats)
import numpy as np

from effc.ir.core import NAN, Attr, Op
from effc.ir.types import NUMPY, Type

Scalar = Any  # a numpy scalar of the IR's dtype

EXACT: dict[str, Callable[..., Scalar]] = {
    "lax.add": np.add, "lax.sub": np.subtract, "lax.mul": np.multiply, "lax.neg": np.negative,
    "lax.abs": np.abs, "lax.max": np.maximum, "lax.min": np.minimum, "lax.floor": np.floor,
    "lax.ceil": np.ceil, "lax.sqrt": np.sqrt, "lax.eq": np.equal, "lax.ne": np.not_equal,
    "lax.lt": np.less, "lax.le": np.less_equal, "lax.gt": np.greater, "lax.ge": np.greater_equal,
}  # fmt: skip
"""Correctly rounded operations; exp and its like differ by an ulp from machine to machine and stay."""

FILLED = frozenset({"lax.reshape", "lax.broadcast_in_dim", "lax.transpose", "lax.squeeze", "lax.expand_dims"})
"""Ops that a filled array passes through: only its shape changes."""

_BOOLEAN: dict[str, Callable[..., Scalar]] = {
    "lax.and": np.logical_and,
    "lax.or": np.logical_or,
    "lax.not": np.logical_not,
}


def folded(op: Op, values: Sequence[Attr], types: Sequence[Type]) -> Attr:
    """What `op` gives on literals `values` of these types; None where it is not to be computed here."""
    out = op.out.type.dtype
    if not values or any(not isinstance(v, int | float) for v in values) or not isinstance(out, str):
        return None
    if op.kind in FILLED:
        return values[0]
    scalars = [_scalar(v, t) for v, t in zip(values, types, strict=True)]
    if any(s is None for s in scalars):
        return None
    with np.errstate(all="ignore"):
        return _literal(_computed(op, scalars, types, out), out)


def _computed(op: Op, scalars: list[Scalar], types: Sequence[Type], out: str) -> Scalar | None:
    if op.kind == "lax.select_n" and len(scalars) == 3:
        return scalars[2] if scalars[0] else scalars[1]
    if op.kind == "lax.convert_element_type":
        return _converted(scalars[0], types[0], out)
    if op.kind == "lax.div":
        return scalars[0] / scalars[1] if _is_float(types[0]) else None
    if types[0].dtype == "bool" and op.kind in _BOOLEAN:
        return _BOOLEAN[op.kind](*scalars)
    return EXACT[op.kind](*scalars) if op.kind in EXACT else None


def _converted(value: Scalar, type_: Type, out: str) -> Scalar | None:
    """Floats to ints only where whole and in range: beyond that machines differ."""
    if _is_float(type_) and not _is_float(Type(out, ())) and out != "bool":
        whole = math.isfinite(value) and float(value).is_integer() and abs(value) < 2**31
        return np.dtype(NUMPY[out]).type(int(value)) if whole else None
    return np.asarray(value).astype(NUMPY[out])[()]


def _is_float(type_: Type) -> bool:
    return isinstance(type_.dtype, str) and (type_.dtype[0] == "f" or type_.dtype == "bf16")


def _scalar(value: Attr, type_: Type) -> Scalar | None:
    if not isinstance(type_.dtype, str) or not isinstance(value, int | float):
        return None
    try:
        return np.asarray(value).astype(NUMPY[type_.dtype])[()]
    except (OverflowError, ValueError):
        return None


def _literal(value: Scalar | None, out: str) -> Attr:
    """A Python literal that prints and reads back as the same number."""
    if value is None:
        return None
    if out == "bool":
        return bool(value)
    if not _is_float(Type(out, ())):
        return int(value)
    number = float(value)
    return NAN if math.isnan(number) else number
