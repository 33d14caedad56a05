"""Canonical spelling before patterns are looked for: one way to write a reshape, no work that changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from effc.frontend.encode import number
from effc.frontend.graph import Graph
from effc.frontend.import_jaxpr import param_slice
from effc.ir.core import Attr, Op
from effc.ir.interpret import Context, apply
from effc.ir.types import Size, Type

Rule = Callable[[Graph, Op], str | None]
"""A cheaper value equal to the op's only output, or None."""


def simplify(graph: Graph) -> None:
    """Apply every rule in program order, merging equal ops, until nothing changes."""
    changed = True
    while changed:
        changed = _sweep(graph)


def _sweep(graph: Graph) -> bool:
    seen: dict[object, Op] = {}
    changed = False
    for op in graph.order():
        op = graph.op(op.outputs[0].name) or op
        better = _improve(graph, op) if len(op.outputs) == 1 else None
        if better is not None and graph.find(better) != op.outputs[0].name:
            graph.become(op.outputs[0].name, better)
            changed = True
            continue
        key = _key(op)
        twin = seen.setdefault(key, op)
        if twin is not op:
            for mine, theirs in zip(op.outputs, twin.outputs, strict=True):
                graph.become(mine.name, theirs.name)
    return changed


def _key(op: Op) -> object:
    if op.regions:
        return id(op)
    types = tuple(str(value.type) for value in op.outputs)
    return (op.kind, op.inputs, tuple(sorted(op.params.items())), repr(sorted(op.attrs.items())), types)


def _improve(graph: Graph, op: Op) -> str | None:
    rules = RULES.get(op.kind, ()) or ()
    for rule in (*rules, _fold):
        better = rule(graph, op)
        if better is not None:
            return better
    return None


# -- shapes ---------------------------------------------------------------------------------------------
def reshaped(graph: Graph, name: str, shape: tuple[Size, ...], op: Op | None = None) -> str:
    """`name` in another shape; nothing where it has it already."""
    type = graph.type(name)
    if type.shape == shape:
        return name
    return graph.one("lax.reshape", [name], Type(type.dtype, shape), op.loc if op else None, new_sizes=shape)


def transposed(graph: Graph, name: str, order: tuple[int, ...], op: Op | None = None) -> str:
    """`name` with its axes in another order; nothing where the order is the same."""
    if order == tuple(range(len(order))):
        return name
    type = graph.type(name)
    shape = tuple(type.shape[i] for i in order)
    return graph.one("lax.transpose", [name], Type(type.dtype, shape), op.loc if op else None, permutation=order)


def _reshape(graph: Graph, op: Op) -> str | None:
    source = graph.op(op.inputs[0])
    if graph.type(op.inputs[0]).shape == op.out.type.shape:
        return op.inputs[0]
    if source and source.kind == "lax.reshape":
        return reshaped(graph, source.inputs[0], op.out.type.shape, op)
    if source and source.kind == "const":
        return graph.one("const", (), op.out.type, op.loc, **_plain(source))
    if source and source.kind == "lax.slice":
        return _one_of_stack(graph, source, op)
    if source and source.kind == "lax.transpose" and _moves_ones(graph, source):
        return reshaped(graph, source.inputs[0], op.out.type.shape, op)
    return None


def _moves_ones(graph: Graph, op: Op) -> bool:
    """A transpose that leaves the order of all axes longer than 1."""
    shape = graph.type(op.inputs[0]).shape
    order = [i for i in _ints(op.attrs["permutation"]) if shape[i] != 1]
    return order == sorted(order)


def _one_of_stack(graph: Graph, cut: Op, op: Op) -> str | None:
    """x[i] of stacked parameters is a parameter of its own."""
    start, limit = _ints(cut.attrs["start"]), _ints(cut.attrs["limit"])
    whole = graph.type(cut.inputs[0]).shape
    axes = [a for a, size in enumerate(whole) if (start[a], limit[a]) != (0, size)]
    if len(axes) != 1 or limit[axes[0]] != start[axes[0]] + 1:
        return None
    rest = (*whole[: axes[0]], *whole[axes[0] + 1 :])
    if op.out.type.shape != rest:
        return None
    return param_slice(graph, cut.inputs[0], axes[0], start[axes[0]])


def _broadcast(graph: Graph, op: Op) -> str | None:
    type = graph.type(op.inputs[0])
    source = graph.op(op.inputs[0])
    if source and source.kind == "const":
        return graph.one("const", (), op.out.type, op.loc, **_plain(source))
    dims = _ints(op.attrs["dims"])
    kept = [size for size in op.out.type.shape if size != 1]
    in_order = list(dims) == sorted(dims) and [size for size in type.shape if size != 1] == kept
    return reshaped(graph, op.inputs[0], op.out.type.shape, op) if in_order else None


def _transpose(graph: Graph, op: Op) -> str | None:
    order = _ints(op.attrs["permutation"])
    if order == tuple(range(len(order))):
        return op.inputs[0]
    source = graph.op(op.inputs[0])
    if source and source.kind == "lax.transpose":
        inner = _ints(source.attrs["permutation"])
        return transposed(graph, source.inputs[0], tuple(inner[i] for i in order), op)
    return _scaled_later(graph, op, source)


def _scaled_later(graph: Graph, op: Op, source: Op | None) -> str | None:
    """transpose(x * c) -> transpose(x) * c: factors move on, where the op that can take them stands."""
    if source is None or source.kind not in {"lax.mul", "lax.div"} or graph.type(source.inputs[1]).shape:
        return None
    if literal(graph, source.inputs[1]) is None:
        return None
    moved = transposed(graph, source.inputs[0], _ints(op.attrs["permutation"]), op)
    return graph.one(source.kind, [moved, source.inputs[1]], op.out.type, source.loc)


def _slice(graph: Graph, op: Op) -> str | None:
    same = graph.type(op.inputs[0]).shape == op.out.type.shape and "strides" not in op.attrs
    return op.inputs[0] if same else None


def _dynamic_slice(graph: Graph, op: Op) -> str | None:
    """A window that starts at literals is a plain slice."""
    starts = [literal(graph, i) for i in op.inputs[1:]]
    shape = graph.type(op.inputs[0]).shape
    fixed = [s for s in starts if isinstance(s, int)]
    inside = all(
        s == 0 or (isinstance(size, int) and isinstance(whole, int) and 0 <= s <= whole - size)
        for s, size, whole in zip(fixed, op.out.type.shape, shape, strict=False)
    )
    if len(fixed) != len(shape) or not inside:
        return None
    limit = tuple(size + s if s else size for s, size in zip(fixed, op.out.type.shape, strict=True))
    return graph.one("lax.slice", [op.inputs[0]], op.out.type, op.loc, start=tuple(fixed), limit=limit)


def _concatenate(graph: Graph, op: Op) -> str | None:
    return op.inputs[0] if len(op.inputs) == 1 else None


# -- numbers --------------------------------------------------------------------------------------------
def _convert(graph: Graph, op: Op) -> str | None:
    same = graph.type(op.inputs[0]).dtype == op.out.type.dtype
    return op.inputs[0] if same else None


def literal(graph: Graph, name: str) -> bool | int | float | None:
    """The number a value is filled with, if it is a literal."""
    op = graph.op(name)
    value = op.attrs["value"] if op and op.kind == "const" else None
    return value if isinstance(value, (bool, int, float)) else None


def _neutral(*values: float, right_only: bool = False) -> Rule:
    """x where the other operand is one of `values`."""

    def rule(graph: Graph, op: Op) -> str | None:
        for at in (1,) if right_only else (1, 0):
            other = op.inputs[1 - at]
            if literal(graph, op.inputs[at]) in values and graph.type(other) == op.out.type:
                return other
        return None

    return rule


def _wrap_negative(graph: Graph, op: Op) -> str | None:
    """select(x < 0, x, x + n): indices from the end, which token ids and positions never are."""
    which, plain, *rest = op.inputs
    test = graph.op(which)
    if test is None or test.kind != "lax.lt" or len(rest) != 1:
        return None
    same = test.inputs[0] == plain and literal(graph, test.inputs[1]) == 0
    return plain if same and never_negative(graph, plain) else None


def _chosen(graph: Graph, op: Op) -> str | None:
    """select(literal, x, y): the one it says."""
    which = literal(graph, op.inputs[0])
    if which is None or not 0 <= which < len(op.inputs) - 1:
        return None
    found = op.inputs[1 + int(which)]
    return found if graph.type(found) == op.out.type else None


def never_negative(graph: Graph, name: str) -> bool:
    """Token ids, positions, and what shapes and sums make of them."""
    op = graph.op(name)
    if op is None:
        return name == "tokens"
    if op.kind in {"positions", "lax.iota"}:
        return True
    if op.kind in {
        "lax.reshape",
        "lax.broadcast_in_dim",
        "lax.transpose",
        "lax.convert_element_type",
        "lax.add",
    }:
        return all(never_negative(graph, i) for i in op.inputs)
    value = literal(graph, name)
    return value is not None and value >= 0


def _fold(graph: Graph, op: Op) -> str | None:
    """A scalar computed from literals is a literal."""
    if op.kind == "const" or not op.kind.startswith("lax.") or op.out.type.shape or not op.inputs:
        return None
    if any(literal(graph, i) is None or graph.type(i).shape for i in op.inputs):
        return None
    context = Context({}, jnp.zeros((1, 1), jnp.int32))
    with jax.ensure_compile_time_eval():
        operands = [apply(graph.op(i), (), {}, context)[0] for i in op.inputs]  # type: ignore[arg-type]
        value = number(np.asarray(apply(op, operands, {}, context)[0]).astype(_host(op)))
    return graph.one("const", (), op.out.type, op.loc, value=value)


def _host(op: Op) -> str:
    dtype = str(op.out.type.dtype)
    return "float64" if dtype[0] in "fb" and dtype != "bool" else ("bool" if dtype == "bool" else "int64")


def _plain(op: Op) -> dict[str, Attr]:
    return {"value": op.attrs["value"]}  # type: ignore[dict-item]


def _ints(attr: object) -> tuple[int, ...]:
    assert isinstance(attr, tuple)
    return attr


RULES: dict[str, tuple[Rule, ...]] = {
    "lax.reshape": (_reshape,), "lax.broadcast_in_dim": (_broadcast,), "lax.transpose": (_transpose,),
    "lax.slice": (_slice,), "lax.concatenate": (_concatenate,), "lax.dynamic_slice": (_dynamic_slice,),
    "lax.convert_element_type": (_convert,),
    "lax.mul": (_neutral(1),), "lax.div": (_neutral(1, right_only=True),), "lax.add": (_neutral(0),),
    "lax.sub": (_neutral(0, right_only=True),), "lax.max": (_neutral(-math.inf),),
    "lax.min": (_neutral(math.inf),), "lax.select_n": (_chosen, _wrap_negative),
}  # fmt: skip
