"""Arrays filled piece by piece -> what they are made of: `x.at[..., 0::2].set(u)` is columns of u among those of x."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import literal, reshaped, transposed
from effc.ir.core import Op
from effc.ir.tokens import Dep, dependence, token_axes
from effc.ir.types import Size, Type
from effc.passes.raising.probe import run_region

Column = tuple[str, int]
"""A value and which of its columns."""

WIDEST = 4096
"""Columns up to which an array is taken apart."""


@dataclass(frozen=True)
class Write:
    """Columns `at` along `axis` are replaced by those of `new`, in order."""

    axis: int
    at: list[int]
    new: str


def raise_columns(graph: Graph) -> None:
    """Every write at fixed places becomes slices put together."""
    for op in graph.order():
        if op.kind in _WRITES and op.outputs[0].name == graph.find(op.outputs[0].name):
            op = graph.op(op.outputs[0].name) or op
            write = _WRITES[op.kind](graph, op)
            if write is not None and not token_axes_along(op, write.axis):
                graph.become(op.outputs[0].name, _put_together(graph, op, write))


def token_axes_along(op: Op, axis: int) -> bool:
    """Whether the columns are tokens, which no slice of fixed places may take apart."""
    return axis in token_axes(op.out.type) or not isinstance(op.out.type.shape[axis], int)


# -- what is written where --------------------------------------------------------------------------------
def _scattered(graph: Graph, op: Op) -> Write | None:
    """A scatter of whole columns at indices that nothing decides but the program."""
    index_map, inserted, window = op.attrs["index_map"], op.attrs["inserted"], op.attrs["window"]
    if not isinstance(index_map, tuple) or len(index_map) != 1 or "batch" in op.attrs:
        return None
    (axis,), places = index_map, _numbers(graph, op.inputs[1])
    width, updates = op.out.type.shape[axis], graph.type(op.inputs[2])  # type: ignore[index]
    if places is None or not isinstance(width, int) or not isinstance(window, tuple):
        return None
    apart = [a for a in range(len(updates.shape)) if a not in window]
    if inserted == () and not apart and places.size == 1:  # a slice that starts at the index
        size = updates.shape[axis]  # type: ignore[index]
        at = list(range(int(places.flat[0]), int(places.flat[0]) + size)) if isinstance(size, int) else []
        return _checked(op, axis, at, op.inputs[2], graph)  # type: ignore[arg-type]
    if inserted != (axis,) or len(apart) > 1:
        return None
    new = _columns_at(graph, op.inputs[2], apart, axis)  # type: ignore[arg-type]
    return _checked(op, axis, [int(i) for i in places.flat], new, graph)  # type: ignore[arg-type]


def _columns_at(graph: Graph, updates: str, apart: Sequence[int], axis: int) -> str:
    """The updates with their columns on `axis`: one column without an axis gets one."""
    shape = graph.type(updates).shape
    if not apart:
        return reshaped(graph, updates, (*shape[:axis], 1, *shape[axis:]))
    rest = [a for a in range(len(shape)) if a != apart[0]]
    return transposed(graph, updates, (*rest[:axis], apart[0], *rest[axis:]))


def _updated(graph: Graph, op: Op) -> Write | None:
    """A dynamic_update_slice that starts at literals and is narrower along one axis at most."""
    whole, part = op.out.type.shape, graph.type(op.inputs[1]).shape
    starts = [literal(graph, i) for i in op.inputs[2:]]
    narrow = [a for a, (n, m) in enumerate(zip(whole, part, strict=True)) if n != m]
    if any(type(s) is not int for s in starts) or len(narrow) > 1:
        return None
    if not narrow:
        return None if any(starts) else Write(0, [], op.inputs[1])
    axis, size = narrow[0], part[narrow[0]]
    start = starts[axis]
    at = list(range(start, start + size)) if isinstance(size, int) and isinstance(start, int) else []
    return _checked(op, axis, at, op.inputs[1], graph)


def _checked(op: Op, axis: int, at: list[int], new: str, graph: Graph) -> Write | None:
    """The write if every place is there, once, and the updates have the shape of the rest."""
    width = op.out.type.shape[axis]
    inside = isinstance(width, int) and width <= WIDEST and all(0 <= i < width for i in at)
    wanted = (*op.out.type.shape[:axis], len(at), *op.out.type.shape[axis + 1 :])
    good = inside and at and len(set(at)) == len(at) and graph.type(new).shape == wanted
    return Write(axis, at, new) if good else None


def _numbers(graph: Graph, name: str) -> np.ndarray | None:
    """The value of indices that neither tokens nor parameters nor sizes decide."""
    ops = graph.order([name])
    if not ops or any(o.params for o in ops) or any(token_axes(v.type) for o in ops for v in o.outputs):
        return None
    if dependence(ops, [v.name for v in graph.inputs])[graph.find(name)] > Dep.NOTHING:
        return None
    return run_region(graph, [name], {})[0].astype(int)


_WRITES = {"lax.scatter": _scattered, "lax.dynamic_update_slice": _updated}


# -- the same without a write -----------------------------------------------------------------------------
def _put_together(graph: Graph, op: Op, write: Write) -> str:
    """What stands in the array after the write."""
    if not write.at:
        return write.new
    columns = _columns(graph, op.inputs[0], write.axis)
    for k, place in enumerate(write.at):
        columns[place] = (write.new, k)
    return _dealt(graph, op, columns, write.axis) or _joined(graph, op, columns, write.axis)


def _columns(graph: Graph, name: str, axis: int) -> list[Column]:
    """The columns of a value; of an array put together, those of its parts."""
    op = graph.op(name)
    if op is not None and op.kind == "lax.concatenate" and op.attrs["dimension"] == axis:
        return [column for part in op.inputs for column in _columns(graph, part, axis)]
    if op is not None and op.kind == "lax.slice" and _cut_along(graph, op, axis) and "strides" not in op.attrs:
        start, limit = (op.attrs[key][axis] for key in ("start", "limit"))  # type: ignore[index, call-overload]
        return _columns(graph, op.inputs[0], axis)[start:limit]  # type: ignore[misc]
    width = graph.type(name).shape[axis]
    assert isinstance(width, int)
    return [(graph.find(name), k) for k in range(width)]


def _cut_along(graph: Graph, op: Op, axis: int) -> bool:
    """Whether a slice cuts along `axis` alone."""
    before, after = graph.type(op.inputs[0]).shape, op.out.type.shape
    return all(a == axis or n == m for a, (n, m) in enumerate(zip(before, after, strict=True))) and isinstance(
        before[axis], int
    )


def _dealt(graph: Graph, op: Op, columns: list[Column], axis: int) -> str | None:
    """The columns of several values in turn, as 0::2 and 1::2 are: stacked, then made one axis."""
    sources = list(dict.fromkeys(name for name, _ in columns))
    n = len(sources)
    shape = op.out.type.shape
    if n < 2 or columns != [(sources[k % n], k // n) for k in range(len(columns))]:
        return None
    part = (*shape[:axis], len(columns) // n, *shape[axis + 1 :])
    if any(graph.type(name).shape != part for name in sources):
        return None
    wide: tuple[Size, ...] = (*part[: axis + 1], 1, *part[axis + 1 :])
    rows = [reshaped(graph, name, wide, op) for name in sources]
    stacked = Type(op.out.type.dtype, (*part[: axis + 1], n, *part[axis + 1 :]))
    both = graph.one("lax.concatenate", rows, stacked, op.loc, dimension=axis + 1)
    return reshaped(graph, both, shape, op)


def _joined(graph: Graph, op: Op, columns: list[Column], axis: int) -> str:
    """Runs of neighbouring columns, one slice each."""
    pieces = []
    for _, run in itertools.groupby(enumerate(columns), key=lambda item: (item[1][0], item[1][1] - item[0])):
        found = [column for _, column in run]
        pieces.append(_slice(graph, op, found[0][0], found[0][1], len(found), axis))
    if len(pieces) == 1:
        return pieces[0]
    return graph.one("lax.concatenate", pieces, op.out.type, op.loc, dimension=axis)


def _slice(graph: Graph, op: Op, name: str, start: int, count: int, axis: int) -> str:
    type = graph.type(name)
    if type.shape[axis] == count:
        return name
    shape = (*type.shape[:axis], count, *type.shape[axis + 1 :])
    first = tuple(start if a == axis else 0 for a in range(len(shape)))
    limit = tuple(start + count if a == axis else size for a, size in enumerate(shape))
    return graph.one("lax.slice", [name], Type(type.dtype, shape), op.loc, start=first, limit=limit)
