"""exp over a sum of exps, however it is spelled -> which value is exponentiated, and what else takes part in the sum.

Weights are exp(z) times masks, over the sum of exp(z) times masks and perhaps of one number more, a sink. Masks in
the sum become part of z; those of the weights must then change nothing, which is tried at points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, log

from effc.frontend.graph import Graph
from effc.frontend.simplify import literal, transposed
from effc.ir.core import Op
from effc.ir.types import Type, name_dim
from effc.passes.raising.probe import SHAPING, peel

T = name_dim("t")
CASTS = frozenset({"lax.convert_element_type"})
MOVES = frozenset({"lax.transpose", "lax.reshape"})
SPREAD = frozenset({"lax.reshape", "lax.broadcast_in_dim"})

SUM = SHAPING | {"lax.abs"}
"""What a sum of exps may go through and stay itself."""

LITTLE = 1e-6
"""What is added to a sum, of which one term is 1, lest it be 0: too little to count."""


@dataclass(frozen=True)
class Softmax:
    """weights = exp(z) / (sum of exp(z) over the last axis of z + exp(sink)).

    after: the moves from the weights to where they are used. ones: masks of the weights, in the axes of z, that must
    be 1 wherever z is seen. sink: a value in the axes of z with one number a head, or that number.
    """

    z: str
    after: tuple[Op, ...] = ()
    ones: tuple[str, ...] = ()
    sink: str | float | None = None


@dataclass(frozen=True)
class Power:
    """exp(z - less) times masks, over numbers `rows` that are the same along the axis of the sum."""

    z: str
    less: str | None = None
    masks: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quotient:
    """exps over their sum along one axis; `more` is what the sum has besides."""

    top: Power
    summed: Power
    axis: int
    more: str | None


def softmax_of(graph: Graph, name: str) -> Softmax | None:
    """The softmax that the weights of a sum over keys are; None where they are none."""
    moves: list[Op] = []
    op = graph.op(name)
    while op is not None and op.kind in MOVES | CASTS:
        moves += [op] if op.kind in MOVES else []
        op = graph.op(op.inputs[0])
    found = _weights(graph, op) if op is not None else None
    return None if found is None else replace(found, after=(*found.after, *moves[::-1]))


def _weights(graph: Graph, op: Op) -> Softmax | None:
    """The same, behind masks and the cut that leaves a sink out."""
    inner = graph.op(peel(graph, op.inputs[0], CASTS)) if op.kind == "lax.slice" else None
    if inner is not None:
        found = quotient(graph, inner)
        return _softmax(graph, found, op) if found else None
    if (found := quotient(graph, op)) is not None:
        return _softmax(graph, found, None)
    for x, mask in masked(graph, op):
        inner = graph.op(peel(graph, x, CASTS))
        weights = _weights(graph, inner) if inner is not None else None
        if weights is not None:
            return replace(weights, ones=(*weights.ones, _like(graph, mask, weights)))
    return None


def _like(graph: Graph, mask: str, weights: Softmax) -> str:
    """A mask in the axes of z."""
    return _last(graph, mask, _axis_before(weights)) if weights.after else mask


def _axis_before(weights: Softmax) -> int:
    """Which axis was turned to the last."""
    order = weights.after[0].attrs["permutation"]
    assert isinstance(order, tuple)
    return order.index(len(order) - 1)


# -- quotients ------------------------------------------------------------------------------------------
def quotient(graph: Graph, op: Op) -> Quotient | None:
    """exps over their sum: a/b, a * (1/b), exp(x - log b)."""
    return next((q for top, below in _over(graph, op) if (q := _paired(graph, top, below)) is not None), None)


def _over(graph: Graph, op: Op) -> list[tuple[str, str]]:
    """What may be a numerator and its denominator."""
    if op.kind == "lax.div":
        return [(op.inputs[0], op.inputs[1])]
    if op.kind == "lax.mul":
        both = (op.inputs, op.inputs[::-1])
        return [(a, below) for a, b in both if (below := _inverse(graph, b)) is not None]
    return _over_log(graph, op) if op.kind == "lax.exp" else []


def _inverse(graph: Graph, name: str) -> str | None:
    """b behind 1/b."""
    op = graph.op(peel(graph, name, SHAPING))
    if op is None:
        return None
    if op.kind == "lax.div" and literal(graph, peel(graph, op.inputs[0], SPREAD)) == 1:
        return op.inputs[1]
    return op.inputs[0] if op.kind == "lax.integer_pow" and op.attrs["y"] == -1 else None


def _over_log(graph: Graph, op: Op) -> list[tuple[str, str]]:
    """exp((z - m) - log b), or exp(z - (log b + m)), where b is a sum of exp(z - m): that exp, and b."""
    less = graph.op(peel(graph, op.inputs[0], CASTS))
    if less is None or less.kind != "lax.sub":
        return []
    names = [graph.op(peel(graph, less.inputs[1], SHAPING))]
    if names[0] is not None and names[0].kind == "lax.add":
        names = [graph.op(peel(graph, i, SHAPING)) for i in names[0].inputs]
    logs = [x for x in names if x is not None and x.kind == "lax.log"]
    total = total_of(graph, logs[0].inputs[0]) if len(logs) == 1 else None
    if total is None:
        return []
    inside, raised = power(graph, total.inputs[0]), power(graph, op.out.name)
    own = raised is not None and inside is not None and not inside.masks and not inside.rows
    if not own or raised is None or inside is None or not _same_but_rows(graph, less, inside):
        return []
    return [(total.inputs[0], logs[0].inputs[0])]


def _same_but_rows(graph: Graph, less: Op, inside: Power) -> bool:
    """Whether what `less` takes numbers from is z, or z - m with only the logarithm taken from it."""
    x = peel(graph, less.inputs[0], CASTS)
    outer = graph.op(peel(graph, less.inputs[1], SHAPING))
    with_max = outer is not None and outer.kind == "lax.add"
    if with_max and outer is not None:
        held = {peel(graph, i, SHAPING) for i in outer.inputs}
        return x == inside.z and (inside.less is None or inside.less in held)
    op = graph.op(x)
    if inside.less is None or op is None or op.kind != "lax.sub":
        return inside.less is None and x == inside.z
    return peel(graph, op.inputs[0], CASTS) == inside.z and peel(graph, op.inputs[1], SHAPING) == inside.less


def _paired(graph: Graph, top: str, below: str) -> Quotient | None:
    """Numerator and denominator, where both are of the same exps."""
    total = total_of(graph, below)
    if total is None:
        return None
    (axis,) = total.attrs["axes"]  # type: ignore[misc]
    assert isinstance(axis, int)
    summed, above = power(graph, total.inputs[0], axis), power(graph, top, axis)
    if summed is None or above is None or (summed.z, summed.less, summed.rows) != (above.z, above.less, above.rows):
        return None
    same = graph.type(top).shape == graph.type(total.inputs[0]).shape
    more = _more(graph, below, total)
    return Quotient(above, summed, axis, more[0] if more else None) if same and len(more) < 2 else None


def total_of(graph: Graph, name: str) -> Op | None:
    """The sum over one axis that a denominator is, numbers added to it aside."""
    op = graph.op(peel(graph, name, SUM))
    if op is not None and op.kind in {"lax.add", "lax.max"}:
        found = [total for i in op.inputs if (total := total_of(graph, i)) is not None]
        return found[0] if len(found) == 1 else None
    axes = op.attrs["axes"] if op is not None and op.kind == "lax.reduce_sum" else ()
    return op if isinstance(axes, tuple) and len(axes) == 1 else None


def _more(graph: Graph, below: str, total: Op) -> list[str]:
    """What is added to the sum; of a larger of two, the other counts as added."""
    op = graph.op(peel(graph, below, SUM))
    if op is None or op.out.name == total.out.name:
        return []
    if op.kind in {"lax.add", "lax.max"}:
        return [more for i in op.inputs for more in _more(graph, i, total)]
    return [op.out.name]


def power(graph: Graph, name: str, axis: int | None = None) -> Power | None:
    """What is exponentiated in a value, and the masks and numbers it is multiplied with."""
    op = graph.op(peel(graph, name, CASTS))
    if op is None:
        return None
    if op.kind == "lax.exp":
        return _exponent(graph, op, axis)
    if op.kind == "lax.div" and _constant_along(graph, op.inputs[1], axis):
        inner = power(graph, op.inputs[0], axis)
        return inner and replace(inner, rows=(*inner.rows, graph.find(op.inputs[1])))
    for x, mask in masked(graph, op):
        if (inner := power(graph, x, axis)) is not None:
            return replace(inner, masks=(*inner.masks, graph.find(mask)))
    return None


def masked(graph: Graph, op: Op) -> list[tuple[str, str]]:
    """x and m where a value may be x times m, or is x where m and else 0."""
    if op.kind == "lax.select_n" and len(op.inputs) == 3:
        which, no, yes = op.inputs
        if literal(graph, peel(graph, no, SPREAD)) == 0:
            return [(yes, which)]
        if literal(graph, peel(graph, yes, SPREAD)) == 0:
            return [(no, graph.one("lax.not", [which], graph.type(which), op.loc))]
    return [(op.inputs[0], op.inputs[1]), (op.inputs[1], op.inputs[0])] if op.kind == "lax.mul" else []


def _exponent(graph: Graph, op: Op, axis: int | None) -> Power:
    """z and the number of each row that is taken from it, as the largest is."""
    name = peel(graph, op.inputs[0], CASTS)
    less = graph.op(name)
    if less is not None and less.kind == "lax.sub" and _constant_along(graph, less.inputs[1], axis):
        return Power(peel(graph, less.inputs[0], CASTS), peel(graph, less.inputs[1], SHAPING))
    return Power(name)


def _constant_along(graph: Graph, name: str, axis: int | None) -> bool:
    """Whether a value is the same along an axis (None: the one that it is seen to be spread over)."""
    op = graph.op(peel(graph, name, CASTS))
    if op is None:
        return False
    shape = op.out.type.shape
    if op.kind == "lax.broadcast_in_dim":
        dims, inner = op.attrs["dims"], graph.type(op.inputs[0]).shape
        assert isinstance(dims, tuple)
        kept = {d for d, size in zip(dims, inner, strict=True) if size != 1}
        return axis not in kept if axis is not None else any(a not in kept for a in range(len(shape)))
    return shape[axis] == 1 if axis is not None and shape else any(size == 1 for size in shape)


# -- canonical form -------------------------------------------------------------------------------------
def _softmax(graph: Graph, found: Quotient, cut: Op | None) -> Softmax | None:
    """z with the masks of the sum, its axis last; None where the sum has something that is no sink."""
    z, axis = found.summed.z, found.axis
    sink = _sink(graph, found) if found.more else None
    if found.more and sink is None:
        return None
    if cut is not None:
        apart = None if sink or found.top.masks or found.summed.masks else _apart(graph, z, axis, cut)
        if apart is None:
            return None
        z, sink = apart
    for mask in found.summed.masks:
        z = _hidden(graph, z, mask)
    ones = () if found.top.masks == found.summed.masks else found.top.masks
    turned = _last(graph, z, axis)
    moves: tuple[Op, ...] = ()
    if turned != z:
        rank = len(graph.type(z).shape)
        back = transposed(graph, turned, (*range(axis), rank - 1, *range(axis, rank - 1)))
        moves = (graph.ops[back],)
    sink = _last(graph, sink, axis) if isinstance(sink, str) else sink
    return Softmax(
        graph.find(turned), moves, tuple(_last(graph, m, axis) for m in ones), None if sink == -inf else sink
    )


def _last(graph: Graph, name: str, axis: int) -> str:
    """A value with this axis last."""
    rank = len(graph.type(name).shape)
    return transposed(graph, name, (*range(axis), *range(axis + 1, rank), axis)) if rank else name


def _hidden(graph: Graph, z: str, mask: str) -> str:
    """exp(z) times a mask as exp of one value."""
    type, held = graph.type(z), graph.type(mask)
    if held.dtype == "bool":
        none = graph.one("const", (), type, value=-inf)
        return graph.one("lax.select_n", [mask, none, z], type)
    if held.dtype != type.dtype:
        mask = graph.one("lax.convert_element_type", [mask], Type(type.dtype, held.shape), dtype=str(type.dtype))
    return graph.one("lax.add", [z, graph.one("lax.log", [mask], Type(type.dtype, held.shape))], type)


def _sink(graph: Graph, found: Quotient) -> str | float | None:
    """s where exp(s - less) is added to the sum; -inf where what is added is too little to count."""
    assert found.more is not None
    less, value = found.summed.less, literal(graph, found.more)
    if value is not None:
        if less is None:
            return log(value) if value > 0 else None
        return -inf if 0 <= value <= LITTLE else None
    op = graph.op(found.more)
    inner = graph.op(peel(graph, op.inputs[0], SHAPING)) if op is not None and op.kind == "lax.exp" else None
    if inner is None:
        return None
    if less is None:
        return inner.out.name
    if inner.kind == "lax.neg" and peel(graph, inner.inputs[0], SHAPING) == less:
        return 0.0
    taken = inner.kind == "lax.sub" and peel(graph, inner.inputs[1], SHAPING) == less
    if not taken:
        return None
    value = literal(graph, inner.inputs[0])
    return graph.find(inner.inputs[0]) if value is None else float(value)


def _apart(graph: Graph, z: str, axis: int, cut: Op) -> tuple[str, str] | None:
    """Scores and the one column put beside them, where a cut leaves the scores' weights."""
    op = graph.op(z)
    if op is None or op.kind != "lax.concatenate" or op.attrs["dimension"] != axis or len(op.inputs) != 2:
        return None
    start = cut.attrs["start"]
    assert isinstance(start, tuple)
    sizes = [graph.type(i).shape[axis] for i in op.inputs]
    if cut.out.type.shape[axis] != T or sorted(map(str, sizes)) != sorted(map(str, (T, 1))):
        return None
    at = sizes.index(T)
    whole = all(s == (at if a == axis else 0) for a, s in enumerate(start))
    return (op.inputs[at], op.inputs[1 - at]) if whole and "strides" not in cut.attrs else None
