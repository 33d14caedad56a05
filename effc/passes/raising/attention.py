"""A softmax over products of two values, times a third -> attention.

The scores' path to the softmax is a function of (score, query position, key position, head). It is run
on numbers: with scores 0 it gives the mask, which must hide every later key; the rest gives scale, cap
and bias. Masks are evaluated point by point, so that no [length, length] array is ever made.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import literal, reshaped, transposed
from effc.ir.core import Attr, Op
from effc.ir.ops import ELEMENTWISE
from effc.ir.tokens import token_axes
from effc.ir.types import Size, Type
from effc.passes.raising.biases import parameters_between
from effc.passes.raising.divided import divide_first
from effc.passes.raising.heads import fewest_heads
from effc.passes.raising.points import Form, Points, Where, sinks
from effc.passes.raising.probe import Unseen, peel
from effc.passes.raising.products import Axes, B, Layout, Operand, Product, T, four, moved, numbers, product_axes
from effc.passes.raising.rows import as_operand, rows_between
from effc.passes.raising.scores import one_product
from effc.passes.raising.softmax import MOVES, softmax_of


def raise_attentions(graph: Graph, context: int) -> list[str]:
    """Every softmax attention becomes an `attention`; returns why those that look like one did not."""
    divide_first(graph)
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
        soft = softmax_of(graph, out.inputs[side])
        if soft is not None and len(token_axes(graph.type(soft.z))) == 2:
            break
    else:
        return None
    one_product(graph, soft.z)
    try:
        scores, path = _scores(graph, soft.z)
        found = product_axes(graph, scores)
        layout = moved(found.axes.straight(len(scores.out.type.shape)), path, found.axes)
        where = Where(found.axes, layout)
        form = Points(graph).form(soft.z, scores.outputs[0].name, where, context, soft.ones)
        extra = _extra(graph, form, soft.z, scores.outputs[0].name)
        params = {} if soft.sink is None else {"sinks": sinks(graph, soft.sink, where)}
        made = _build(graph, out, side, scores, found, moved(layout, soft.after, found.axes), form, extra, params)
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


def _build(
    graph: Graph, out: Op, side: int, scores: Op, found: Product, layout: Layout, form: Form, extra: list[str],
    params: Mapping[str, str],
) -> str:  # fmt: skip
    """The attention, in the axes that the product of probabilities and values had."""
    value = _values(graph, out, 1 - side, found.axes, layout)
    q = four(graph, scores.inputs[found.queries], found.q)
    k, v = fewest_heads(
        graph, four(graph, scores.inputs[1 - found.queries], found.k), four(graph, out.inputs[1 - side], value)
    )
    if graph.type(k).shape[2] != graph.type(v).shape[2]:
        raise Unseen(f"keys {graph.type(k)} and values {graph.type(v)} have different heads")
    q, k, factor = _unscaled(graph, q, k)
    attrs, region = _scaled(form.attrs, factor), form.bias
    type = Type(out.out.type.dtype, (B, T, graph.type(q).shape[2], graph.type(v).shape[3]))
    regions = {"bias": region} if region else {}
    operands = [q, k, v, *extra]
    (made,) = graph.add("attention", operands, type, params=params, attrs=attrs, regions=regions, loc=scores.loc)
    return _as_product(graph, made, out, side, found.axes, layout, value)


def _values(graph: Graph, out: Op, side: int, axes: Axes, layout: Layout) -> Operand:
    """Axes of the values: tokens are summed with the keys, heads go with those of the scores."""
    contract, batch = numbers(out)
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
    _, batch = numbers(out)
    width = [graph.type(out.inputs[1 - side]).shape[a] for a in value.width]
    split: list[Size] = [B, T, *(axes.sizes[a] for a in axes.heads), *width]
    place = {axes.batch: 0, axes.query: 1} | {a: 2 + n for n, a in enumerate(axes.heads)}
    spread = {n: [place[a] for a in group] for n, group in enumerate(layout) if group != (axes.key,)}
    free = [n for n in spread if n not in batch[side]]
    tail = list(range(len(split) - len(width), len(split)))
    mine = [k for n in free for k in spread[n]]
    order = [k for n in batch[side] for k in spread[n]] + ([*mine, *tail] if side == 0 else [*tail, *mine])
    turned = transposed(graph, reshaped(graph, made, tuple(split)), tuple(order))
    return reshaped(graph, turned, out.out.type.shape)


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
