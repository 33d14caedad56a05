"""A softmax over products of two values, times a third -> attention.

The scores' path to the softmax is a function of (score, query position, key position, head). It is run
on numbers: with scores 0 it gives the mask, which must hide every later key; the rest gives scale, cap
and bias. Masks are evaluated point by point, so that no [length, length] array is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import literal, reshaped, transposed
from effc.ir.core import Attr, Op
from effc.ir.ops import ELEMENTWISE
from effc.ir.tokens import token_axes
from effc.ir.types import Size, Type, depends, divide, name_dim, product
from effc.passes.raising.biases import parameters_between
from effc.passes.raising.heads import fewest_heads, straight
from effc.passes.raising.points import Form, Points, Where
from effc.passes.raising.probe import Unseen, peel
from effc.passes.raising.rows import as_operand, rows_between

B, T = name_dim("b"), name_dim("t")
CASTS = frozenset({"lax.convert_element_type"})


@dataclass(frozen=True)
class Softmax:
    """p = softmax(z) over the last axis of z; `after` are the moves from p to where it is used."""

    p: str
    z: str
    after: tuple[Op, ...]


@dataclass(frozen=True)
class Operand:
    """Axes of one operand of a product: sequences, tokens, heads in the order they take, width."""

    batch: int
    token: int
    heads: tuple[int, ...]
    width: tuple[int, ...]


@dataclass(frozen=True)
class Axes:
    """Axes of the scores' product: sequences, queries, keys, heads that keys share, the queries' own heads.

    Heads that share an axis with the sequences have a number of their own after all axes: `merged`.
    """

    batch: int
    query: int
    key: int
    shared: tuple[int, ...]
    own: tuple[int, ...]
    sizes: tuple[Size, ...]
    merged: int | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """Head axes in the order in which `attention` counts heads."""
        return (*self.shared, *self.own)

    def straight(self, rank: int) -> Layout:
        """The layout of the product itself."""
        both = () if self.merged is None else (self.merged,)
        return tuple((a, *both) if a == self.batch else (a,) for a in range(rank))


Layout = tuple[tuple[int, ...], ...]
"""For each axis of a value, the axes of the scores' product it is made of: reshapes merge them."""


def raise_attentions(graph: Graph, context: int) -> list[str]:
    """Every softmax attention becomes an `attention`; returns why those that look like one did not."""
    notes: list[str] = []
    for op in graph.order():
        if op.kind == "lax.dot_general" and op.outputs[0].name == graph.find(op.outputs[0].name):
            reason = _raise(graph, graph.op(op.outputs[0].name) or op, context)
            if reason:
                notes.append(f"{op.loc}: attention not raised: {reason}")
    return notes


def _raise(graph: Graph, out: Op, context: int) -> str | None:
    """Raise the attention whose product with the values is `out`; why not, if it looks like one."""
    for side in (0, 1):
        soft = _softmax(graph, out.inputs[side])
        if soft is not None:
            break
    else:
        return None
    try:
        scores, path = _scores(graph, soft.z)
        found = _product(graph, scores)
        layout = _moved(found.axes.straight(len(scores.out.type.shape)), path, found.axes)
        form = Points(graph).form(soft.z, scores.outputs[0].name, Where(found.axes, layout), context)
        tables = _extra(graph, form, soft.z, scores.outputs[0].name)
        made = _build(graph, out, side, soft, scores, found, _moved(layout, soft.after, found.axes), form, tables)
    except Unseen as reason:
        return str(reason)
    graph.become(out.outputs[0].name, made)
    return None


def _extra(graph: Graph, form: Form, z: str, scores: str) -> list[str]:
    """What the bias of this attention reads, as values: rows by key and by query, and tables."""
    rows = rows_between(graph, z, scores)
    params = parameters_between(graph, z, [scores, *(row.name for row in rows)]) if form.tables else []
    names = [params[at] for at in form.tables]
    tables = [graph.add("param", (), graph.params[n].type, params={"value": n})[0] for n in names]
    return [*(as_operand(graph, rows[at]) for at in (*form.keyed, *form.asked)), *tables]


MOVES = frozenset({"lax.transpose", "lax.reshape"})


def _softmax(graph: Graph, name: str) -> Softmax | None:
    """The softmax over the last axis that a value is, casts and moves aside."""
    after: list[Op] = []
    op = graph.op(name)
    while op is not None and op.kind in MOVES | CASTS:
        after += [op] if op.kind in MOVES else []
        name, op = op.inputs[0], graph.op(op.inputs[0])
    p = graph.find(name)
    if op is None or op.kind != "lax.div":
        return None
    top = graph.op(peel(graph, op.inputs[0], CASTS))
    below = graph.op(peel(graph, op.inputs[1], CASTS | {"lax.reshape", "lax.broadcast_in_dim"}))
    if top is None or below is None or top.kind != "lax.exp" or below.kind != "lax.reduce_sum":
        return None
    rank = len(graph.type(top.outputs[0].name).shape)
    summed = graph.op(peel(graph, below.inputs[0], CASTS))
    if below.attrs["axes"] != (rank - 1,) or summed != top or len(token_axes(graph.type(p))) != 2:
        return None
    less, after = graph.op(top.inputs[0]), after[::-1]
    if less is not None and less.kind == "lax.sub" and _is_max(graph, less.inputs[1]):
        return Softmax(p, graph.find(less.inputs[0]), tuple(after))
    return Softmax(p, graph.find(top.inputs[0]), tuple(after))


def _is_max(graph: Graph, name: str) -> bool:
    """Whether `name` is the same number for a whole row: then it cancels, whatever it is."""
    op = graph.op(peel(graph, name, {"lax.reshape", "lax.broadcast_in_dim", "lax.convert_element_type", "lax.max"}))
    return op is not None and op.kind == "lax.reduce_max"


def _scores(graph: Graph, z: str) -> tuple[Op, list[Op]]:
    """The product of two token-indexed values that z is computed from, and the moves from it to z."""
    stack: list[tuple[str, list[Op]]] = [(z, [])]
    seen = set[str]()
    while stack:
        name, path = stack.pop()
        op = graph.op(name)
        if op is None or name in seen:
            continue
        seen.add(name)
        if op.kind == "lax.dot_general" and all(len(token_axes(graph.type(i))) == 1 for i in op.inputs):
            return op, path
        if op.kind in ELEMENTWISE | MOVES:
            stack += [(i, [op, *path] if op.kind in MOVES else path) for i in op.inputs]
    raise Unseen("no product of queries and keys under the softmax")


def _moved(layout: Layout, moves: Sequence[Op], axes: Axes) -> Layout:
    """A layout after transposes and reshapes."""
    for op in moves:
        if op.kind == "lax.transpose":
            order = op.attrs["permutation"]
            assert isinstance(order, tuple)
            layout = tuple(layout[a] for a in order)  # type: ignore[index, misc]
        else:
            layout = _regrouped([a for group in layout for a in group], op.out.type.shape, axes)
    return layout


def _regrouped(flat: list[int], shape: Sequence[Size], axes: Axes) -> Layout:
    """Consecutive axes put together so that their products are the new sizes."""
    groups: list[tuple[int, ...]] = []
    for size in shape:
        group: list[int] = []
        while product(tuple(axes.sizes[a] for a in group)) != size:
            if not flat:
                raise Unseen("scores are reshaped in a way that does not keep heads whole")
            group.append(flat.pop(0))
        groups.append(tuple(group))
    if any(axes.sizes[a] != 1 for a in flat):
        raise Unseen("scores are reshaped in a way that does not keep heads whole")
    return tuple(groups)


# -- axes -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Product:
    """The scores' product: which operand is the queries, the axes of both and of the result."""

    queries: int
    q: Operand
    k: Operand
    axes: Axes


def _product(graph: Graph, op: Op) -> Product:
    """What each axis of the scores' product is; the softmax's last axis must turn out to be its keys."""
    contract, batch = _numbers(op)
    free = [
        [a for a in range(len(graph.type(op.inputs[s]).shape)) if a not in (*contract[s], *batch[s])] for s in (0, 1)
    ]
    tokens = [token_axes(graph.type(i)) for i in op.inputs]
    if any(graph.type(op.inputs[s]).shape[tokens[s][0]] != T or tokens[s][0] not in free[s] for s in (0, 1)):
        raise Unseen("an operand of the scores has no axis of tokens alone")
    sequences = [i for i, a in enumerate(batch[0]) if depends(graph.type(op.inputs[0]).shape[a], "b")]
    if len(sequences) != 1:
        raise Unseen("the scores' product keeps no axis of sequences")
    keys = 1 if len(free[1]) == 1 else 0
    if len(free[keys]) != 1:
        raise Unseen("keys have heads that queries lack")
    return _sided(op, 1 - keys, sequences[0], free, tokens)


def _sided(op: Op, queries: int, at: int, free: list[list[int]], tokens: list[list[int]]) -> Product:
    """The product with this operand for queries; `at` is the batch axis of sequences."""
    contract, batch = _numbers(op)
    place = {(s, a): len(batch[0]) + n for n, (s, a) in enumerate([(s, a) for s in (0, 1) for a in free[s]])}
    shared = [i for i in range(len(batch[0])) if i != at]
    own = [a for a in free[queries] if a != tokens[queries][0]]
    sizes, merged = list(op.out.type.shape), divide(op.out.type.shape[at], B)
    if merged is None:
        raise Unseen(f"axis of size {sizes[at]} is not sequences times heads")
    apart = len(sizes) if merged != 1 else None
    if apart is not None:
        sizes = [*sizes[:at], B, *sizes[at + 1 :], merged]
    query, key = (place[(s, tokens[s][0])] for s in (queries, 1 - queries))
    heads = tuple(shared) if apart is None else (apart, *shared)
    axes = Axes(at, query, key, heads, tuple(place[(queries, a)] for a in own), tuple(sizes), apart)
    q, k = (
        Operand(
            batch[s][at],
            tokens[s][0],
            (*(batch[s][i] for i in shared), *(own if s == queries else ())),
            contract[s],
        )
        for s in (queries, 1 - queries)
    )
    return Product(queries, q, k, axes)


def _numbers(op: Op) -> tuple[Any, Any]:
    """Contracted and batch axes of a product."""
    return op.attrs["contract"], op.attrs.get("batch", ((), ()))


def _four(graph: Graph, name: str, operand: Operand) -> str:
    """The operand as [b,t,heads,width]."""
    shape, at = graph.type(name).shape, operand.batch
    merged = divide(shape[at], B)
    if merged is None:
        raise Unseen(f"axis of size {shape[at]} is not sequences times heads")
    axes = [at, operand.token, *operand.heads, *operand.width]
    heads = product(tuple(shape[a] for a in operand.heads))
    if merged != 1:  # sequences and heads on one axis: split it
        name = reshaped(graph, name, (*shape[:at], B, merged, *shape[at + 1 :]))
        batch, token, *rest = [a + 1 if a > at else a for a in axes]
        axes, heads = [batch, token, at + 1, *rest], heads * merged  # type: ignore[assignment]
    moved = transposed(graph, name, tuple(axes))
    return straight(graph, reshaped(graph, moved, (B, T, heads, product(tuple(shape[a] for a in operand.width)))))


def _build(
    graph: Graph, out: Op, side: int, soft: Softmax, scores: Op, found: Product, layout: Layout,
    form: Form, tables: list[str],
) -> str:  # fmt: skip
    """The attention, in the axes that the product of probabilities and values had."""
    value = _values(graph, out, 1 - side, found.axes, layout)
    q = _four(graph, scores.inputs[found.queries], found.q)
    k, v = fewest_heads(
        graph, _four(graph, scores.inputs[1 - found.queries], found.k), _four(graph, out.inputs[1 - side], value)
    )
    if graph.type(k).shape[2] != graph.type(v).shape[2]:
        raise Unseen(f"keys {graph.type(k)} and values {graph.type(v)} have different heads")
    q, k, factor = _unscaled(graph, q, k)
    attrs, region = _scaled(form.attrs, factor), form.bias
    type = Type(out.out.type.dtype, (B, T, graph.type(q).shape[2], graph.type(v).shape[3]))
    regions = {"bias": region} if region else {}
    (made,) = graph.add("attention", [q, k, v, *tables], type, attrs=attrs, regions=regions, loc=scores.loc)
    return _as_product(graph, made, out, side, found.axes, layout, value)


def _values(graph: Graph, out: Op, side: int, axes: Axes, layout: Layout) -> Operand:
    """Axes of the values: tokens are summed with the keys, heads go with those of the scores."""
    contract, batch = _numbers(out)
    type = graph.type(out.inputs[side])
    summed = [layout[a] for a in contract[1 - side]]
    if summed != [(axes.key,)] or token_axes(type) != list(contract[side]):
        raise Unseen("the probabilities are not summed with the values over the keys alone")
    of = {layout[p]: v for p, v in zip(batch[1 - side], batch[side], strict=True)}
    first = next((group for group in of if group[:1] == (axes.batch,)), None)
    if first is None:
        raise Unseen("the product with the values keeps no axis of sequences")
    groups = sorted((g for g in of if g != first), key=lambda group: [axes.heads.index(a) for a in group])
    flat = (*first[1:], *(a for group in groups for a in group))
    if flat not in (axes.shared, axes.heads):
        raise Unseen("values have other heads than keys")
    width = tuple(a for a in range(len(type.shape)) if a not in (*batch[side], *contract[side]))
    return Operand(of[first], contract[side][0], tuple(of[group] for group in groups), width)


def _as_product(graph: Graph, made: str, out: Op, side: int, axes: Axes, layout: Layout, value: Operand) -> str:
    """attention's [b,t,h,e] in the axes of the product with the values."""
    _, batch = _numbers(out)
    width = [graph.type(out.inputs[1 - side]).shape[a] for a in value.width]
    split: list[Size] = [B, T, *(axes.sizes[a] for a in axes.heads), *width]
    place = {axes.batch: 0, axes.query: 1} | {a: 2 + n for n, a in enumerate(axes.heads)}
    spread = {n: [place[a] for a in group] for n, group in enumerate(layout) if group != (axes.key,)}
    free = [n for n in spread if n not in batch[side]]
    tail = list(range(len(split) - len(width), len(split)))
    mine = [k for n in free for k in spread[n]]
    order = [k for n in batch[side] for k in spread[n]] + ([*mine, *tail] if side == 0 else [*tail, *mine])
    moved = transposed(graph, reshaped(graph, made, tuple(split)), tuple(order))
    return reshaped(graph, moved, out.out.type.shape)


def _unscaled(graph: Graph, q: str, k: str) -> tuple[str, str, float]:
    """Queries and keys without a number they are multiplied by, and that number."""
    factor = 1.0
    names: list[str] = []
    for name in (q, k):
        op = graph.op(_unmoved(graph, name))
        value = literal(graph, op.inputs[1]) if op and op.kind in {"lax.mul", "lax.div"} else None
        if op is not None and value and not graph.type(op.inputs[1]).shape and graph.type(name).dtype == "f32":
            factor *= float(value) if op.kind == "lax.mul" else 1 / float(value)
            name = _moved_like(graph, name, op.inputs[0])
        names.append(name)
    return names[0], names[1], factor


def _unmoved(graph: Graph, name: str) -> str:
    return peel(graph, name, {"lax.transpose", "lax.reshape"})


def _moved_like(graph: Graph, name: str, base: str) -> str:
    """`base` through the transposes and reshapes that end in `name`."""
    chain: list[Op] = []
    op = graph.op(name)
    while op is not None and op.kind in {"lax.transpose", "lax.reshape"}:
        chain.append(op)
        op = graph.op(op.inputs[0])
    for step in reversed(chain):
        base = graph.one(step.kind, [base], step.out.type, step.loc, **step.attrs)  # type: ignore[arg-type]
    return base


def _scaled(attrs: dict[str, Attr], factor: float) -> dict[str, Attr]:
    scale = float(str(np.float32(float(attrs.get("scale", 1.0)) * factor)))  # type: ignore[arg-type]
    return {k: v for k, v in {**attrs, "scale": scale}.items() if k != "scale" or v != 1.0}
