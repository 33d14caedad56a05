"""The product of queries and keys: which of its axes are sequences, tokens and heads, and where moves take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effc.frontend.graph import Graph
from effc.frontend.simplify import reshaped, transposed
from effc.ir.core import Op
from effc.ir.tokens import token_axes
from effc.ir.types import Size, depends, divide, name_dim, product
from effc.passes.raising.heads import straight
from effc.passes.raising.probe import Unseen

B, T = name_dim("b"), name_dim("t")


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


def moved(layout: Layout, moves: Sequence[Op], axes: Axes) -> Layout:
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


@dataclass(frozen=True)
class Product:
    """The scores' product: which operand is the queries, the axes of both and of the result."""

    queries: int
    q: Operand
    k: Operand
    axes: Axes


def product_axes(graph: Graph, op: Op) -> Product:
    """What each axis of the scores' product is; the softmax's last axis must turn out to be its keys."""
    contract, batch = numbers(op)
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
    contract, batch = numbers(op)
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


def numbers(op: Op) -> tuple[Any, Any]:
    """Contracted and batch axes of a product."""
    return op.attrs["contract"], op.attrs.get("batch", ((), ()))


def four(graph: Graph, name: str, operand: Operand) -> str:
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
    turned = transposed(graph, name, tuple(axes))
    return straight(graph, reshaped(graph, turned, (B, T, heads, product(tuple(shape[a] for a in operand.width)))))
