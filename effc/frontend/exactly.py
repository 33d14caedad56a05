"""A module that computes in half precision, as the same computation in f32: what its rounding is measured from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from effc.ir.core import Attr, Func, Module, Op, Param, Ref, Value
from effc.ir.stream import Reads
from effc.ir.types import Type

HALF = frozenset({"bf16", "f16"})


def halved(module: Module) -> bool:
    """Whether anything is computed in half precision."""
    return any(v.type.dtype in HALF for func in module.funcs.values() for op in func.ops for v in op.outputs)


def exactly(module: Module) -> Module:
    """Every half-precision value, parameter and conversion in f32 instead."""
    params = {name: replace(param, type=_type(param.type)) for name, param in module.params.items()}
    return replace(module, params=params, funcs={name: _func(func) for name, func in module.funcs.items()})


@dataclass(frozen=True)
class Widened:
    """A parameter of a store read as f32 where it is stored in half precision."""

    param: Param
    read: Callable[[int], Mapping[str, np.ndarray]]


def widened(module: Module, store: Mapping[str, Reads]) -> dict[str, Widened]:
    """The store of `exactly(module)`."""
    return {name: Widened(param, _wide(store[name], param)) for name, param in module.params.items()}


def _wide(lazy: Reads, param: Param) -> Callable[[int], Mapping[str, np.ndarray]]:
    if param.type == lazy.param.type:
        return lazy.read
    return lambda i: {suffix: x.astype(np.float32) for suffix, x in lazy.read(i).items()}


def _type(type: Type) -> Type:
    return Type("f32", type.shape) if type.dtype in HALF else type


def _func(func: Func) -> Func:
    return replace(func, inputs=tuple(map(_value, func.inputs)), ops=tuple(map(_op, func.ops)))


def _value(value: Value) -> Value:
    return replace(value, type=_type(value.type))


def _op(op: Op) -> Op:
    attrs = {name: _attr(name, value) for name, value in op.attrs.items()}
    regions = {role: _func(region) for role, region in op.regions.items()}
    return replace(op, outputs=tuple(map(_value, op.outputs)), attrs=attrs, regions=regions)


def _attr(name: str, value: Attr | Ref) -> Attr | Ref:
    if isinstance(value, Type):
        return _type(value)
    return "f32" if name == "dtype" and value in HALF else value
