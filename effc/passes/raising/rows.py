"""What masks read of the tokens themselves: values with a row a token, such as whether it is padding.

A mask over pairs of tokens is followed back to where it is made of such values: one is read at the
key, or at the query, or at both. Stand-ins take their place while a mask is tried out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combined

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import reshaped, transposed
from effc.ir.interpret import shape_of
from effc.ir.tokens import token_axes
from effc.ir.types import BYTES, NUMPY, Size, Type, evaluate, name_dim, product
from effc.passes.raising.probe import SHAPING, Unseen, region

B, T = name_dim("b"), name_dim("t")
MOST = 4096
"""Numbers a token of what a mask may read."""


@dataclass(frozen=True)
class Row:
    """A value with one row a token, and its axes of sequences and tokens."""

    name: str
    batch: int
    token: int
    type: Type

    @property
    def rest(self) -> tuple[int, ...]:
        """The other axes longer than 1."""
        return tuple(a for a, n in enumerate(self.type.shape) if a not in (self.batch, self.token) and n != 1)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes of these."""
        return tuple(self.type.shape[a] for a in self.rest)

    def ordered(self, array: np.ndarray) -> np.ndarray:
        """An array of its shape as [b,t,...]."""
        moved = np.moveaxis(array, (self.batch, self.token), (0, 1))
        return moved.reshape(*moved.shape[:2], *(evaluate(n, {}) for n in self.sizes))


def rows_between(graph: Graph, z: str, scores: str, others: Sequence[str] = ()) -> list[Row]:
    """Rows of tokens that the path from scores to softmax reads, in an order that equal layers share."""
    found: dict[str, Row] = {}
    stack, seen = [*others, z], {graph.find(scores)}
    while stack:
        name = graph.find(stack.pop())
        if name in seen:
            continue
        seen.add(name)
        if len(token_axes(graph.type(name))) == 1 and _reads_tokens(graph, name, scores):
            row = _narrowest(graph, name)
            found.setdefault(row.name, row)
            continue
        op = graph.op(name)
        stack += reversed(op.inputs) if op else []
    return list(found.values())


def _reads_tokens(graph: Graph, name: str, scores: str) -> bool:
    """Whether a value is made of operands of the program; Unseen where it is made of the scores."""
    known = graph.memo.setdefault("reads tokens", {})
    if name not in known:
        ops = region(graph, [name], [])
        known[name] = graph.op(name) is None or any(graph.op(i) is None for op in ops for i in op.inputs)
    if known[name] and any(op.out.name == graph.find(scores) for op in region(graph, [name], [])):
        raise Unseen("what is added to the scores depends on them")
    return bool(known[name])


def _narrowest(graph: Graph, name: str) -> Row:
    """The value before it was cast and moved, where that takes no more room."""
    row, op = _row(graph, name), graph.op(name)
    while op is not None and op.kind in SHAPING:
        inner = _row(graph, op.inputs[0])
        if inner is None or (row is not None and _bytes(inner) > _bytes(row)):
            break
        row, op = inner, graph.op(op.inputs[0])
    if row is None or _bytes(row) > MOST:
        raise Unseen(f"the mask depends on the tokens by a value {graph.type(name)}")
    return row


def _row(graph: Graph, name: str) -> Row | None:
    type = graph.type(name)
    if type.shape.count(B) != 1 or type.shape.count(T) != 1 or len(token_axes(type)) != 1:
        return None
    return Row(graph.find(name), type.shape.index(B), type.shape.index(T), type)


def _bytes(row: Row) -> int:
    """Of one token."""
    return evaluate(product(row.sizes), {}) * int(BYTES[str(row.type.dtype)] or 1)


def as_operand(graph: Graph, row: Row) -> str:
    """The value as [b,t,...]."""
    ones = [a for a in range(len(row.type.shape)) if a not in (row.batch, row.token, *row.rest)]
    moved = transposed(graph, row.name, (row.batch, row.token, *row.rest, *ones))
    return reshaped(graph, moved, (B, T, *row.sizes))


# -- stand-ins ------------------------------------------------------------------------------------------
StandIns = Mapping[str, np.ndarray]
"""An array for each row's value, by name, in the value's own shape."""


def constants(rows: Sequence[Row], sizes: Mapping[str, int]) -> Iterator[StandIns]:
    """Every value the same for all tokens, 1 or 0: one of these lets a query see the most keys."""
    choices = combined((1, 0), repeat=len(rows)) if len(rows) <= 3 else iter([(1,) * len(rows), (0,) * len(rows)])
    for chosen in choices:
        yield {row.name: np.full(_shape(row, sizes), x, _dtype(row)) for row, x in zip(rows, chosen, strict=True)}


def drawn(rows: Sequence[Row], sizes: Mapping[str, int], literals: Sequence[float], seed: int) -> StandIns:
    """Random values: near the numbers that the program compares with, and any others."""
    rng = np.random.default_rng(seed)
    near = [x + d for x in (0.0, 1.0, *literals) if np.isfinite(x) and abs(x) < 1e6 for d in (0, 1)]
    return {row.name: _drawn(row, _shape(row, sizes), near, rng) for row in rows}


def _drawn(row: Row, shape: tuple[int, ...], near: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    if row.type.dtype == "bool":
        return rng.random(shape) < 0.7
    picked = rng.choice(np.array(near), shape)
    if np.issubdtype(_dtype(row), np.integer):
        return np.maximum(picked, 0).astype(_dtype(row))
    return np.where(rng.random(shape) < 0.5, rng.normal(size=shape), picked).astype(_dtype(row))


def _dtype(row: Row) -> np.dtype:
    return np.dtype(NUMPY[str(row.type.dtype)])


def _shape(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return shape_of(row.type, sizes)
