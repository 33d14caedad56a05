"""Scores that are no single product as one: factors a head or a token go to queries or keys, sums of products join."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import literal, reshaped, transposed
from effc.ir.core import Op
from effc.ir.interpret import shape_of
from effc.ir.ops import ELEMENTWISE
from effc.ir.tokens import token_axes
from effc.ir.types import Size, Type, product
from effc.passes.raising.heads import shape_chain
from effc.passes.raising.probe import SIZES, Unseen, close, run_region, signature
from effc.passes.raising.products import Axes, B, Layout, Operand, Product, T, four, moved, product_axes
from effc.passes.raising.softmax import CASTS, MOVES

SCALES = frozenset({"lax.mul", "lax.div"})


@dataclass(frozen=True)
class Chain:
    """A product of two values that hold tokens, and the ops that move, cast or scale it by a number, first first."""

    dot: Op
    steps: tuple[Op, ...] = ()

    def layout(self, axes: Axes) -> Layout:
        """Where its axes are at the end."""
        return moved(axes.straight(len(self.dot.out.type.shape)), [op for op in self.steps if op.kind in MOVES], axes)

    def again(self, graph: Graph, dot: str) -> str:
        """The same steps from another product."""
        for op in self.steps:
            at = next(n for n, i in enumerate(op.inputs) if literal(graph, i) is None)
            inputs = [dot if n == at else i for n, i in enumerate(op.inputs)]
            dot = graph.one(op.kind, inputs, op.out.type, op.loc, **op.attrs)  # type: ignore[arg-type]
        return dot


def one_product(graph: Graph, z: str) -> None:
    """Rewrite what z is made of until it is made of one product, as far as can be."""
    while any(_factored(graph, op) or _joined(graph, op) for op in _under(graph, z)):
        pass


def _under(graph: Graph, z: str) -> Iterator[Op]:
    """Ops that z is computed from, down to products."""
    stack, seen = [z], set[str]()
    while stack:
        op = graph.op(stack.pop())
        if op is not None and op.out.name not in seen and op.kind in ELEMENTWISE | MOVES and _pairs(op.out.type):
            seen.add(op.out.name)
            yield op
            stack += op.inputs


def _pairs(type: Type) -> bool:
    return len(token_axes(type)) == 2


def _chain(graph: Graph, name: str) -> Chain | None:
    """How a value comes straight from a product."""
    steps: list[Op] = []
    op = graph.op(name)
    while op is not None and op.kind != "lax.dot_general":
        numbers = [literal(graph, i) is not None for i in op.inputs]
        if op.kind not in MOVES | CASTS and not (op.kind in SCALES and numbers in ([False, True], [True, False])):
            return None
        if op.kind == "lax.div" and numbers[0]:
            return None
        steps.append(op)
        op = graph.op(op.inputs[numbers.index(False)])
    whole = op is not None and all(len(token_axes(graph.type(i))) == 1 for i in op.inputs)
    return Chain(op, tuple(steps[::-1])) if op is not None and whole else None


# -- factors --------------------------------------------------------------------------------------------
def _factored(graph: Graph, op: Op) -> bool:
    """scores * f, f the same for all keys or for all queries -> scores of queries or keys times f."""
    if op.kind not in SCALES:
        return False
    for side in (0, 1) if op.kind == "lax.mul" else (0,):
        chain, factor = _chain(graph, op.inputs[side]), op.inputs[1 - side]
        if chain is not None and literal(graph, factor) is None:
            try:
                return _taken_in(graph, op, chain, factor)
            except Unseen:
                return False
    return False


def _taken_in(graph: Graph, op: Op, chain: Chain, factor: str) -> bool:
    found = product_axes(graph, chain.dot)
    rank = len(op.out.type.shape)
    factor = _unspread(graph, factor, rank)
    shape, layout = graph.type(factor).shape, chain.layout(found.axes)
    long = [a for a, size in enumerate(shape) if size != 1]
    if len(shape) != rank or any(len(layout[a]) != 1 for a in long):
        return False
    wanted = {layout[a][0]: a for a in long}
    for side, operand, own in _sides(found):
        where = own | dict(zip(found.axes.heads, operand.heads, strict=False))
        name = chain.dot.inputs[side]
        if set(wanted) <= set(where) and graph.type(name).dtype == graph.type(factor).dtype:
            places = {where[axis]: a for axis, a in wanted.items()}
            scaled = graph.one(op.kind, [name, _laid(graph, factor, places, name)], graph.type(name), op.loc)
            inputs = [scaled if i == side else x for i, x in enumerate(chain.dot.inputs)]
            (dot,) = graph.add(
                chain.dot.kind, inputs, chain.dot.out.type, attrs=chain.dot.attrs, loc=chain.dot.loc
            )  # fmt: skip
            graph.become(op.out.name, chain.again(graph, dot))
            return True
    return False


def _sides(found: Product) -> list[tuple[int, Operand, dict[int, int]]]:
    """Queries, then keys: which operand of the product, its axes, and where the axes of scores are in it."""
    axes = found.axes
    return [
        (found.queries, found.q, {axes.batch: found.q.batch, axes.query: found.q.token}),
        (1 - found.queries, found.k, {axes.batch: found.k.batch, axes.key: found.k.token}),
    ]


def _unspread(graph: Graph, name: str, rank: int) -> str:
    """A value before it was stretched, with 1 for the sizes that it had not; of this rank where it is one number."""
    op = graph.op(name)
    if op is not None and op.kind == "lax.broadcast_in_dim":
        dims, inner = op.attrs["dims"], graph.type(op.inputs[0]).shape
        assert isinstance(dims, tuple)
        sizes: list[Size] = [1] * rank
        for d, size in zip(dims, inner, strict=True):
            sizes[d] = size  # type: ignore[call-overload]
        if list(dims) == sorted(dims):  # type: ignore[type-var]
            return reshaped(graph, op.inputs[0], tuple(sizes), op)
    return name if graph.type(name).shape else reshaped(graph, name, (1,) * rank)


def _laid(graph: Graph, factor: str, places: Mapping[int, int], like: str) -> str:
    """A factor along the axes of a value: for some of these, the axis it has it on."""
    shape = graph.type(factor).shape
    order = [places[a] for a in sorted(places)]
    turned = transposed(graph, factor, (*order, *(a for a in range(len(shape)) if a not in order)))
    rank = len(graph.type(like).shape)
    return reshaped(graph, turned, tuple(shape[places[a]] if a in places else 1 for a in range(rank)))


# -- sums -----------------------------------------------------------------------------------------------
def _joined(graph: Graph, op: Op) -> bool:
    """q k + p l -> the product of q and p beside one another with k and l, as positions beside content give."""
    chains = [_chain(graph, i) for i in op.inputs] if op.kind == "lax.add" else []
    if len(chains) != 2 or chains[0] is None or chains[1] is None:
        return False
    first, second = chains[0], chains[1]
    known = graph.memo.setdefault("joined", {})
    operands = list(dict.fromkeys(shape_chain(graph, i)[-1] for i in (*first.dot.inputs, *second.dot.inputs)))
    text = signature(graph, [op.out.name], operands)
    try:
        made = _side_by_side(graph, op, first, second) if known.get(text, True) else ""
    except Unseen:
        made = ""
    if text not in known:
        rng = np.random.default_rng(0)
        feeds = {i: rng.normal(size=shape_of(graph.type(i), SIZES)) for i in operands}
        before, after = run_region(graph, [op.out.name, made or op.out.name], feeds)
        known[text] = bool(made) and close(before, after)
    if known[text] and made:
        graph.become(op.out.name, made)
    return bool(known[text] and made)


def _side_by_side(graph: Graph, op: Op, first: Chain, second: Chain) -> str:
    """One product of wider queries and keys, in the axes of the sum."""
    found = [product_axes(graph, chain.dot) for chain in (first, second)]
    heads = product(tuple(found[0].axes.sizes[a] for a in found[0].axes.heads))
    sides: list[list[str]] = [[], []]
    for chain, each in zip((first, second), found, strict=True):
        if product(tuple(each.axes.sizes[a] for a in each.axes.heads)) != heads:
            raise Unseen("products of different heads are added")
        q = _times(graph, four(graph, chain.dot.inputs[each.queries], each.q), chain)
        sides[0].append(q)
        sides[1].append(_spread(graph, four(graph, chain.dot.inputs[1 - each.queries], each.k), heads))
    q, k = (_beside(graph, names, op) for names in sides)
    scores = Type(op.out.type.dtype, (B, heads, T, T))
    dot = graph.one("lax.dot_general", [q, k], scores, op.loc, contract=((3,), (3,)), batch=((0, 2), (0, 2)))
    axes, layout = found[0].axes, first.layout(found[0].axes)
    order = [axes.batch, *axes.heads, axes.query, axes.key]
    apart = reshaped(graph, dot, tuple(axes.sizes[a] for a in order))
    turned = transposed(graph, apart, tuple(order.index(a) for group in layout for a in group))
    return reshaped(graph, turned, op.out.type.shape)


def _times(graph: Graph, name: str, chain: Chain) -> str:
    """Queries times the numbers that their scores are multiplied by."""
    for op in chain.steps:
        if op.kind in SCALES:
            number = next(i for i in op.inputs if literal(graph, i) is not None)
            value = graph.one("const", (), Type(graph.type(name).dtype, ()), op.loc, value=literal(graph, number))  # type: ignore[arg-type]
            name = graph.one(op.kind, [name, value], graph.type(name), op.loc)
    return name


def _spread(graph: Graph, k: str, heads: Size) -> str:
    """Keys [b,t,g,d] of which several heads read each, as many as the heads."""
    b, t, g, d = graph.type(k).shape
    if g == heads:
        return k
    if not isinstance(g, int) or not isinstance(heads, int):
        raise Unseen("keys of unknown heads")
    wide: tuple[Size, ...] = (b, t, g, heads // g, d)
    type = Type(graph.type(k).dtype, wide)
    spread = graph.one("lax.broadcast_in_dim", [k], type, shape=wide, dims=(0, 1, 2, 4))
    return reshaped(graph, spread, (b, t, heads, d))


def _beside(graph: Graph, names: list[str], op: Op) -> str:
    types = [graph.type(name) for name in names]
    width = types[0].shape[3] + types[1].shape[3]  # type: ignore[operator]
    whole = Type(types[0].dtype, (*types[0].shape[:3], width))
    return graph.one("lax.concatenate", names, whole, op.loc, dimension=3)
