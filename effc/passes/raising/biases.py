"""What is added to scores, as a region of scalars: the value at one head, query and key, op by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from effc.frontend.graph import Graph
from effc.ir.core import Attr, Func, Op, Value
from effc.ir.ops import ELEMENTWISE
from effc.ir.types import DType, Size, Type, product
from effc.passes.raising.indices import into_operand
from effc.passes.raising.probe import Unseen, region
from effc.passes.raising.rows import Row

Index = tuple[str, ...]
I32 = Type("i32", ())
SEQUENCE = "sequence"
"""Stands for the index of the sequence, which a region is not told: it must read rows by it alone."""


class Scalars:
    """Writes a region while it follows a value back to positions, literals and tables."""

    def __init__(self, graph: Graph, scores: str, rows: Sequence[Row] = ()) -> None:
        self.graph, self.scores = graph, scores  # what stands for 0
        self.rows = {row.name: row for row in rows}
        self.keyed: dict[str, Value] = {}  # rows of the key, of the query
        self.asked: dict[str, Value] = {}
        self.joined: dict[str, tuple[tuple[Size, ...], list[str]]] = {}
        self.ops: list[Op] = []
        self.used: dict[str, Value] = {}  # operands of the region: tables, read whole
        self.memo: dict[tuple[str, Index], str] = {}
        self.numbers: dict[tuple[str, int], str] = {}

    def region(self, result: str) -> Func:
        """The function of (i, j, h, rows of the key, of the query, tables used)."""
        given = [Value(name, I32) for name in "ijh"]
        rows = (*self.keyed.values(), *self.asked.values())
        ops = _live(self.ops, result)
        if any(SEQUENCE in op.inputs for op in ops):
            raise Unseen("the mask depends on the tokens of one sequence in a way of its own")
        return Func("bias", (*given, *rows, *self.used.values()), ops, (result,))

    # -- writing ----------------------------------------------------------------------------------------
    def op(self, kind: str, inputs: Index, dtype: DType, /, **attrs: Attr) -> str:
        name = f"s{len(self.ops)}"
        self.ops.append(Op(kind, inputs, (Value(name, Type(dtype, ())),), attrs=attrs))
        return name

    def number(self, value: int) -> str:
        """A literal index."""
        if ("i32", value) not in self.numbers:
            self.numbers["i32", value] = self.op("const", (), "i32", value=value)
        return self.numbers["i32", value]

    def sum(self, x: str, n: int) -> str:
        return self.op("lax.add", (x, self.number(n)), "i32") if n else x

    # -- following --------------------------------------------------------------------------------------
    def value(self, name: str, index: Index) -> str:
        """The scalar at `index`, one i32 scalar an axis."""
        name = self.graph.find(name)
        if (name, index) not in self.memo:
            row = self.rows.get(name)
            self.memo[name, index] = self._made(name, index) if row is None else self._row(row, index)
        return self.memo[name, index]

    def _row(self, row: Row, index: Index) -> str:
        """One number of what the key's or the query's token has."""
        side = {"j": self.keyed, "i": self.asked}.get(index[row.token])
        if side is None or index[row.batch] != SEQUENCE:
            raise Unseen("the mask reads tokens beside the query and the key")
        letter = "k" if side is self.keyed else "q"
        given = side.setdefault(row.name, Value(f"{letter}{len(side)}", Type(row.type.dtype, row.sizes)))
        return self.one(given, tuple(index[a] for a in row.rest)) if row.rest else given.name

    def one(self, value: Value, index: Index) -> str:
        """One number of an array."""
        name, ones = f"r{len(self.ops)}", (1,) * len(value.type.shape)
        cut = Value(name, Type(value.type.dtype, ones))
        self.ops.append(Op("lax.dynamic_slice", (value.name, *index), (cut,), attrs={"slice_sizes": ones}))
        return self.op("lax.reshape", (name,), value.type.dtype, new_sizes=())

    def _made(self, name: str, index: Index) -> str:
        op = self.graph.op(name)
        if name == self.scores:
            return self.op("const", (), self.graph.type(name).dtype, value=0.0)
        if op is None:
            raise Unseen("the mask depends on the tokens")
        if op.kind in ELEMENTWISE:
            inputs = tuple(self.value(i, self.clamped(i, index)) for i in op.inputs)
            return self.op(op.kind, inputs, op.out.type.dtype, **op.attrs)  # type: ignore[arg-type]
        if op.kind not in RULES:
            raise Unseen(f"no rule for '{op.kind}' in a bias {op.loc or ''}")
        return RULES[op.kind](self, op, index)

    def flat(self, sizes: list[Size], index: list[str]) -> str:
        """One index for several axes, row-major."""
        long = [(size, x) for size, x in zip(sizes, index, strict=True) if size != 1]
        if not long:
            return self.number(0)
        flat = long[0][1]
        for size, x in long[1:]:
            if not isinstance(size, int):
                raise Unseen("a bias is reshaped across tokens")
            flat = self.op("lax.add", (self.op("lax.mul", (flat, self.number(size)), "i32"), x), "i32")
        self.joined[flat] = tuple(size for size, _ in long), [x for _, x in long]
        return flat

    def apart(self, sizes: Sequence[Size], flat: str) -> list[str]:
        """The reverse: an index for each axis."""
        long = [a for a, size in enumerate(sizes) if size != 1]
        out = [self.number(0)] * len(sizes)
        shape, parts = self.joined.get(flat, ((), []))
        if shape and shape == tuple(sizes[a] for a in long):
            for a, part in zip(long, parts, strict=True):
                out[a] = part
            return out
        for a in reversed(long[1:]):
            size = sizes[a]
            if not isinstance(size, int):
                raise Unseen("a bias is reshaped across tokens")
            out[a] = self.op("lax.rem", (flat, self.number(size)), "i32")
            flat = self.op("lax.div", (flat, self.number(size)), "i32")
        if long:
            out[long[0]] = flat
        return out

    def clamped(self, name: str, index: Index) -> Index:
        shape = self.graph.type(name).shape
        return tuple(self.number(0) if size == 1 else at for size, at in zip(shape, index, strict=False))


def _const(at: Scalars, op: Op, index: Index) -> str:
    if not isinstance(op.attrs["value"], int | float):
        raise Unseen("the mask depends on the length of the call")
    return at.op("const", (), op.out.type.dtype, value=op.attrs["value"])  # type: ignore[arg-type]


def _iota(at: Scalars, op: Op, index: Index) -> str:
    dimension = op.attrs["dimension"]
    assert isinstance(dimension, int)
    dtype = op.out.type.dtype
    x = index[dimension]
    return x if dtype == "i32" else at.op("lax.convert_element_type", (x,), dtype, dtype=str(dtype))


def _moved(at: Scalars, op: Op, index: Index) -> str:
    return at.value(op.inputs[0], at.clamped(op.inputs[0], into_operand(op, index)))


def _reshape(at: Scalars, op: Op, index: Index) -> str:
    before, after = at.graph.type(op.inputs[0]).shape, op.out.type.shape
    groups = _groups(before, after)
    if groups is None:
        raise Unseen("a bias is reshaped across tokens")
    back = [at.number(0)] * len(before)
    for old, new in groups:
        flat = at.flat([after[a] for a in new], [index[a] for a in new])
        for axis, x in zip(old, at.apart([before[a] for a in old], flat), strict=True):
            back[axis] = x
    return at.value(op.inputs[0], tuple(back))


def _groups(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
    """Axes of both shapes that are the same elements, as few together as can be; None where tokens are merged."""
    old, new = ([a for a, size in enumerate(shape) if size != 1] for shape in (before, after))
    groups: list[tuple[list[int], list[int]]] = []
    while old and new:
        mine, theirs = [old.pop(0)], [new.pop(0)]
        while True:
            m, n = product(tuple(before[a] for a in mine)), product(tuple(after[a] for a in theirs))
            if m == n:
                break
            if not (isinstance(m, int) and isinstance(n, int)) or not (old if m < n else new):
                return None
            (mine if m < n else theirs).append((old if m < n else new).pop(0))
        groups.append((mine, theirs))
    return groups


def _slice(at: Scalars, op: Op, index: Index) -> str:
    start = op.attrs["start"]
    if "strides" in op.attrs or not isinstance(start, tuple) or not all(isinstance(s, int) for s in start):
        raise Unseen("a bias is cut in a way effc does not follow")
    moved = tuple(at.sum(x, s) for x, s in zip(index, start, strict=True))  # type: ignore[arg-type]
    return at.value(op.inputs[0], moved)


def _embed(at: Scalars, op: Op, index: Index) -> str:
    row = at.value(op.inputs[0], index[:-1])
    return _read(at, op, op.params["table"], (row, index[-1]))


def _param(at: Scalars, op: Op, index: Index) -> str:
    return _read(at, op, op.params["value"], index)


def _read(at: Scalars, op: Op, param: str, index: Index) -> str:
    """One number of a table."""
    type = at.graph.params[param].type
    if param not in at.used:
        at.used[param] = Value(f"x{len(at.used)}", type)
    return at.one(at.used[param], index)


def _live(ops: Sequence[Op], result: str) -> tuple[Op, ...]:
    """Those that the result needs."""
    needed, kept = {result}, list[Op]()
    for op in reversed(ops):
        if op.out.name in needed:
            needed.update(op.inputs)
            kept.append(op)
    return tuple(reversed(kept))


Rule = Callable[[Scalars, Op, Index], str]
RULES: Mapping[str, Rule] = {
    "const": _const, "lax.iota": _iota, "lax.broadcast_in_dim": _moved, "lax.transpose": _moved,
    "lax.reshape": _reshape, "lax.slice": _slice, "embed": _embed, "param": _param,
}  # fmt: skip


def parameters_between(graph: Graph, z: str, given: Sequence[str]) -> list[str]:
    """Parameters that the path from scores and rows to softmax reads, in an order that equal layers share."""
    return list(dict.fromkeys(p for op in region(graph, [z], given) for p in op.params.values()))
