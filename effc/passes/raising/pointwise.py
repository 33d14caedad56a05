"""One value of a graph at single points, by a rule a primitive: no array over pairs of tokens is made whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from effc.frontend.graph import Graph
from effc.ir.core import Op
from effc.ir.interpret import concrete, shape_of
from effc.ir.ops import ELEMENTWISE
from effc.passes.raising.indices import into_operand
from effc.passes.raising.probe import Unseen, constant_of, region, run_region
from effc.runtime import primitives

Index = tuple[np.ndarray, ...]
MANY = 1 << 22
"""Values of fewer elements may be made whole where there is no rule for a point of them."""


class Tables:
    """Stand-ins for parameters: 0, or random numbers; `touched` once one was read that is no fixed array."""

    def __init__(self) -> None:
        self.touched = self.random = False

    def array(self, graph: Graph, param: str) -> np.ndarray:
        """The fixed array that a parameter is, or its stand-in."""
        fixed = constant_of(graph, param)
        if fixed is not None:
            return fixed
        self.touched = True
        shape = shape_of(graph.params[param].type, {})
        rng = np.random.default_rng(len(param) + sum(shape))
        return rng.normal(size=shape).astype(np.float32) if self.random else np.zeros(shape, np.float32)


class At:
    """One evaluation at points; `feeds` are values that are the same number everywhere, `rows` arrays of values."""

    def __init__(
        self, graph: Graph, sizes: dict[str, int], feeds: dict[str, np.float32], tables: Tables,
        rows: Mapping[str, np.ndarray],
    ) -> None:  # fmt: skip
        self.graph, self.sizes, self.feeds, self.tables, self.rows = graph, sizes, feeds, tables, rows
        self.memo: dict[object, Any] = {}

    def value(self, name: str, index: Index) -> Any:
        """The value at `index`, arrays of indices that broadcast together, one an axis."""
        name = self.graph.find(name)
        if name in self.feeds:
            return self.feeds[name]
        if name in self.rows:
            return self.rows[name][tuple(np.asarray(i) for i in index)]
        key = (name, *(id(a) for a in index))
        if key not in self.memo:
            self.memo[key] = (self._compute(name, index), index)  # keeps the index alive, so ids stay unique
        return self.memo[key][0]

    def _compute(self, name: str, index: Index) -> Any:
        op = self.graph.op(name)
        if op is None:
            raise Unseen("the mask depends on the tokens")
        if op.kind in ELEMENTWISE:
            return self._elementwise(op, index)
        rule = _RULES.get(op.kind)
        result = rule(self, op, index) if rule else None
        return self._whole(op, name, index) if result is None else result

    def _elementwise(self, op: Op, index: Index) -> Any:
        attrs = {key: concrete(v, self.sizes) for key, v in op.attrs.items()}
        operands = [self.value(i, self.clamped(i, index)) for i in op.inputs]
        dtypes = [primitives.dtype_of(str(self.graph.type(i).dtype)) for i in op.inputs]
        arrays = [jnp.asarray(x, d) for x, d in zip(operands, dtypes, strict=True)]
        shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
        arrays = [jnp.broadcast_to(a, shape) for a in arrays]
        return np.asarray(primitives.LAX[op.kind.removeprefix("lax.")](*arrays, **attrs))

    def clamped(self, name: str, index: Index) -> Index:
        """The index into an operand: 0 along axes of size 1."""
        shape = self.graph.type(name).shape
        if not shape:
            return ()
        return tuple(_ZERO if size == 1 else at for size, at in zip(shape, index, strict=True))

    def _whole(self, op: Op, name: str, index: Index) -> Any:
        """Points of a value made whole, if it is small and depends on nothing."""
        shape = shape_of(self.graph.type(name), self.sizes)
        ops = region(self.graph, [name], [])
        if not all(self._constant(p) for o in ops for p in o.params.values()):
            raise Unseen("the mask depends on parameters")
        made = {v.name for o in ops for v in o.outputs}
        if any(i not in made for o in ops for i in o.inputs):
            raise Unseen("the mask depends on the tokens")
        if np.prod(shape) > MANY:
            raise Unseen(f"no rule for a point of '{op.kind}' {op.loc or ''}")
        key = ("whole", name)
        if key not in self.memo:
            params = {p: constant_of(self.graph, p) for o in ops for p in o.params.values()}
            self.memo[key] = run_region(self.graph, [name], {}, self.sizes, params)[0]
        return self.memo[key][tuple(index)] if index else self.memo[key]

    def _constant(self, param: str) -> bool:
        return self.graph.params[param].path in self.graph.constants


_ZERO = np.zeros((), np.int64)


def _const(at: At, op: Op, index: Index) -> Any:
    return np.asarray(concrete(op.attrs["value"], at.sizes))


def _iota(at: At, op: Op, index: Index) -> Any:
    dimension = op.attrs["dimension"]
    assert isinstance(dimension, int)
    return index[dimension]


def _moved(at: At, op: Op, index: Index) -> Any:
    return at.value(op.inputs[0], at.clamped(op.inputs[0], into_operand(op, index)))


def _reshape(at: At, op: Op, index: Index) -> Any:
    before, after = at.graph.type(op.inputs[0]).shape, op.out.type.shape
    if [s for s in before if s != 1] == [s for s in after if s != 1]:
        long = iter([i for i, s in zip(index, after, strict=True) if s != 1])
        return at.value(op.inputs[0], tuple(_ZERO if s == 1 else next(long) for s in before))
    sizes = shape_of(op.out.type, at.sizes)
    flat: Any = 0
    for i, s in zip(index, sizes, strict=True):
        flat = flat * s + i
    inner = shape_of(at.graph.type(op.inputs[0]), at.sizes)
    return at.value(op.inputs[0], tuple(np.unravel_index(np.asarray(flat), inner)))


def _slice(at: At, op: Op, index: Index) -> Any:
    start = concrete(op.attrs["start"], at.sizes)
    strides = concrete(op.attrs.get("strides"), at.sizes) or (1,) * len(start)
    shape = shape_of(at.graph.type(op.inputs[0]), at.sizes)
    moved = tuple(np.asarray(s + i * k) for s, i, k in zip(start, index, strides, strict=True))
    if any((m >= n).any() for m, n in zip(moved, shape, strict=True)):
        raise Unseen(f"a table of {list(shape)} entries is shorter than the context")
    return at.value(op.inputs[0], moved)


def _concatenate(at: At, op: Op, index: Index) -> Any:
    axis = op.attrs["dimension"]
    assert isinstance(axis, int)
    start, out = 0, None
    for name in op.inputs:
        size = shape_of(at.graph.type(name), at.sizes)[axis]
        inside = np.clip(index[axis] - start, 0, size - 1)
        piece = at.value(name, (*index[:axis], inside, *index[axis + 1 :]))
        out = piece if out is None else np.where(index[axis] >= start, piece, out)
        start += size
    return out


def _embed(at: At, op: Op, index: Index) -> Any:
    row = np.asarray(at.value(op.inputs[0], index[:-1])).astype(np.int64)
    table = at.tables.array(at.graph, op.params["table"])
    if row.min() < 0 or row.max() >= len(table):
        raise Unseen(f"a table of {len(table)} rows is shorter than the context")
    return table[row, index[-1]]


def _param(at: At, op: Op, index: Index) -> Any:
    return at.tables.array(at.graph, op.params["value"])[tuple(np.asarray(i) for i in index)]


_RULES = {
    "embed": _embed, "param": _param, "const": _const,
    "lax.iota": _iota, "lax.broadcast_in_dim": _moved, "lax.transpose": _moved,
    "lax.reshape": _reshape, "lax.slice": _slice, "lax.concatenate": _concatenate,
}  # fmt: skip
