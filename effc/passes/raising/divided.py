"""Products with weights that are divided by their sum afterwards -> weights that are divided first."""

from __future__ import annotations

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import reshaped, transposed
from effc.ir.core import Op
from effc.ir.interpret import shape_of
from effc.ir.tokens import token_axes
from effc.ir.types import Type
from effc.passes.raising.probe import SIZES, close, peel, run_region, signature
from effc.passes.raising.softmax import CASTS, MOVES, power, total_of


def divide_first(graph: Graph) -> None:
    """(exp(z) v) / sum exp(z) -> (exp(z) / sum exp(z)) v, wherever the product was moved in between."""
    for op in graph.order():
        if op.kind == "lax.div" and op.out.name == graph.find(op.out.name):
            op = graph.op(op.out.name) or op
            product = graph.op(peel(graph, op.inputs[0], MOVES | CASTS))
            if product is not None and product.kind == "lax.dot_general":
                _divide(graph, op, product)


def _divide(graph: Graph, op: Op, product: Op) -> None:
    total = total_of(graph, op.inputs[1])
    for side in (0, 1):
        weights, contract = product.inputs[side], product.attrs["contract"]
        assert isinstance(contract, tuple)
        axes = contract[side]
        if total is None or not isinstance(axes, tuple) or len(axes) != 1 or len(token_axes(graph.type(weights))) != 2:
            continue
        if power(graph, weights) is None or power(graph, weights) != power(graph, total.inputs[0]):
            continue
        made = _quotient_first(graph, op, product, side, int(axes[0]))  # type: ignore[arg-type]
        if _same(graph, op.out.name, made, product):
            graph.become(op.out.name, made)
        return


def _quotient_first(graph: Graph, op: Op, product: Op, side: int, axis: int) -> str:
    """The product of divided weights, moved as the program moves it."""
    name = peel(graph, product.inputs[side], CASTS)
    type, kept = graph.type(name), tuple(a for a in range(len(graph.type(name).shape)) if a != axis)
    row = Type(type.dtype, tuple(type.shape[a] for a in kept))
    total = graph.one("lax.reduce_sum", [name], row, op.loc, axes=(axis,))
    spread = graph.one("lax.broadcast_in_dim", [total], type, op.loc, shape=type.shape, dims=kept)
    inputs = list(product.inputs)
    inputs[side] = graph.one("lax.div", [name, spread], type, op.loc)
    (made,) = graph.add(product.kind, inputs, product.out.type, attrs=product.attrs, loc=product.loc)
    return _moved_like(graph, op.inputs[0], made)


def _moved_like(graph: Graph, name: str, base: str) -> str:
    """`base` through the moves that end in `name`."""
    op = graph.op(name)
    if op is None or op.kind not in MOVES | CASTS:
        return base
    base = _moved_like(graph, op.inputs[0], base)
    if op.kind == "lax.reshape":
        return reshaped(graph, base, op.out.type.shape, op)
    if op.kind == "lax.transpose":
        return transposed(graph, base, op.attrs["permutation"], op)  # type: ignore[arg-type]
    return graph.one(op.kind, [base], op.out.type, op.loc, **op.attrs)  # type: ignore[arg-type]


def _same(graph: Graph, old: str, new: str, product: Op) -> bool:
    """Whether both are the same numbers: the total may have been laid out otherwise than the weights were."""
    known = graph.memo.setdefault("divided", {})
    text = signature(graph, [old, new], product.inputs)
    if text not in known:
        rng = np.random.default_rng(0)
        feeds = {i: rng.uniform(0.5, 2, shape_of(graph.type(i), SIZES)) for i in product.inputs}
        before, after = run_region(graph, [old, new], feeds)
        known[text] = graph.type(old) == graph.type(new) and close(before, after)
    return bool(known[text])
