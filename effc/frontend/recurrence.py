"""`lax.scan` over the tokens -> `recur`: one sequence's carry, kept for every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from effc.frontend.body import front, numbered, unfront
from effc.frontend.graph import Graph
from effc.frontend.regions import Flow, row_axes
from effc.frontend.simplify import reshaped, simplify, transposed
from effc.ir.core import Attr, Func, Op, Ref
from effc.ir.types import Dim, Size, Type, depends, name_dim, polynomial

B, T = name_dim("b"), name_dim("t")


def counts(op: Op) -> tuple[int, int]:
    """Constants and carries of a scan."""
    consts, carry = op.attrs["consts"], op.attrs["carry"]
    assert isinstance(consts, int) and isinstance(carry, int)
    return consts, carry


def recurs(flow: Flow, op: Op) -> bool:
    """Whether an op is a scan from the first token to the last whose carry begins the same for all tokens."""
    if op.kind != "lax.scan" or op.attrs["length"] != T or op.attrs["reverse"]:
        return False
    consts, carry = counts(op)
    types = [flow.types[name] for name in op.inputs]
    begins = not any(flow.tokens(name) for name in op.inputs[: consts + carry])
    whole = not any(_by_call(type) for type in types[:consts])
    alone = all(_sequences(type) <= 1 for type in types[consts:])
    given = all(row_axes(value.type) for value in op.outputs[carry:])
    return begins and whole and alone and given and not _mentions(op.regions["body"], "t")


def raise_recurrence(graph: Graph, op: Op) -> list[str]:
    """Replace such a scan."""
    consts, carry = counts(op)
    body = op.regions["body"]
    start = [_begin(graph, name) for name in op.inputs[consts : consts + carry]]
    rows = [_rows(graph, name) for name in op.inputs[consts + carry :]]
    outs = [graph.type(value.name) for value in op.outputs[carry:]]
    types = [Type(x.dtype, (B, T, *_without(x.shape[1:]))) for x in outs]
    inner = _of_one(body, consts, carry)
    attrs: dict[str, Attr] = {"consts": consts, "carry": carry}
    operands = [*op.inputs[:consts], *start, *rows]
    made = graph.add("recur", operands, types, attrs=attrs, regions={"body": inner}, loc=op.loc)
    for value, new in zip(op.outputs[carry:], made, strict=True):
        graph.become(value.name, unfront(graph, new, value.type))
    return []


def _begin(graph: Graph, name: str) -> str:
    """What a carry begins with, one for each sequence: [b,...]."""
    shape = graph.type(name).shape
    at = next((a for a, size in enumerate(shape) if size == B), None)
    if at is None:
        type = Type(graph.type(name).dtype, (B, *shape))
        return graph.one("lax.broadcast_in_dim", [name], type, shape=type.shape, dims=tuple(range(1, len(shape) + 1)))
    return transposed(graph, name, (at, *(a for a in range(len(shape)) if a != at)))


def _rows(graph: Graph, name: str) -> str:
    """What is scanned as [b,t,...]: what positions decide is the same for all sequences."""
    type = graph.type(name)
    if row_axes(type):
        return front(graph, name)
    wide = Type(type.dtype, (B, *type.shape))
    dims = tuple(range(1, len(wide.shape)))
    return graph.one("lax.broadcast_in_dim", [name], wide, shape=wide.shape, dims=dims)


def _of_one(body: Func, consts: int, carry: int) -> Func:
    """The body for one sequence, whose carries and items have no axis of sequences."""
    graph = Graph()
    names: dict[str, str] = {}
    for at, value in enumerate(body.inputs):
        type = _one(value.type)
        plain = Type(type.dtype, _without(value.type.shape)) if at >= consts else type
        names[value.name] = reshaped(graph, graph.input(f"u{at}", plain), type.shape)
    for op in body.ops:
        op = _fixed(op)
        types = [v.type for v in op.outputs]
        made = graph.add(op.kind, [names[i] for i in op.inputs], types, attrs=op.attrs, regions=op.regions, loc=op.loc)
        names.update(zip((v.name for v in op.outputs), made, strict=True))
    known = body.types()
    graph.results = [reshaped(graph, names[r], _without(known[r].shape)) for r in body.results]
    simplify(graph)
    return numbered(graph.func("body"))


def _without(shape: Sequence[Size]) -> tuple[Size, ...]:
    """A shape without its axis of sequences."""
    return tuple(size for size in shape if size != B)


# -- one sequence ---------------------------------------------------------------------------------------
def _one_size(size: Size) -> Size:
    """A size where there is one sequence."""
    if not isinstance(size, Dim):
        return size
    total: Size = 0
    for monomial, value in size.terms:
        kept = tuple((name, power) for name, power in monomial if name != "b")
        total = polynomial({kept: value}) + total
    return total


def _one(type: Type) -> Type:
    return Type(type.dtype, tuple(map(_one_size, type.shape)))


def _attr(attr: Attr | Ref) -> Attr | Ref:
    if isinstance(attr, Dim):
        return _one_size(attr)
    if isinstance(attr, tuple):
        return tuple(_attr(item) for item in attr)  # type: ignore[misc]
    return attr


def _fixed(op: Op) -> Op:
    outputs = tuple(replace(value, type=_one(value.type)) for value in op.outputs)
    regions = {
        role: replace(
            region,
            inputs=tuple(replace(v, type=_one(v.type)) for v in region.inputs),
            ops=tuple(map(_fixed, region.ops)),
        )
        for role, region in op.regions.items()
    }
    return replace(op, outputs=outputs, attrs={k: _attr(v) for k, v in op.attrs.items()}, regions=regions)


def _sequences(type: Type) -> int:
    """How many axes sequences are on; 2 where one holds more than sequences."""
    sizes = [size for size in type.shape if depends(size, "b")]
    return len(sizes) if all(size == B for size in sizes) else 2


def _by_call(type: Type) -> bool:
    return any(depends(size, name) for size in type.shape for name in "bt")


def _mentions(func: Func, name: str) -> bool:
    types = [value.type for value in func.inputs] + [v.type for op in func.ops for v in op.outputs]
    return any(depends(size, name) for type in types for size in type.shape)
