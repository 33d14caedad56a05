"""Arrays that a program captures and that grow with the length: the first rows of a table taken at a greater length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from effc.errors import EffcError
from effc.frontend.encode import dtype_name
from effc.frontend.graph import Graph
from effc.frontend.trace import B, T
from effc.ir.types import Size, Type


class Growing(Exception):
    """A captured array is larger in the longer trace, and none of a greater length is at hand."""


def table_of(graph: Graph, p: np.ndarray, q: np.ndarray, long: np.ndarray, shape: tuple[Size, ...]) -> str:
    """The array of `shape` that is `p` and `q` in the two traces and `long` in a third; EffcError if it is no table."""
    table = _of_one(long, shape)
    whole = all(size in (B, T) or isinstance(size, int) for size in shape)
    if not whole or not all(_begins(table, _of_one(x, shape), x) for x in (p, q)):
        raise EffcError(
            f"lowering: the program captures an array that changes with the call, {list(p.shape)} and "
            f"{list(q.shape)}, and not by rows alone; want it computed from the tokens' shape with jax.numpy"
        )
    return _rows(graph, table, shape)


def _of_one(x: np.ndarray, shape: Sequence[Size]) -> np.ndarray:
    """What the first sequence has."""
    return x[tuple(slice(1) if size == B else slice(None) for size in shape)]


def _begins(table: np.ndarray, one: np.ndarray, whole: np.ndarray) -> bool:
    """Whether the table begins with an array, and the array is the same for all sequences."""
    first = table[tuple(slice(n) for n in one.shape)]
    return np.array_equal(first, one) and np.array_equal(np.broadcast_to(one, whole.shape), whole)


def _rows(graph: Graph, table: np.ndarray, shape: tuple[Size, ...]) -> str:
    """The first t rows along every axis of tokens, stretched over the sequences."""
    one = tuple(1 if size == B else size for size in shape)
    type = Type(dtype_name(table.dtype), one)
    if table.ndim == 1 and table.dtype.kind in "iu" and np.array_equal(table, np.arange(len(table))):
        return graph.one("lax.iota", (), type, dtype=str(type.dtype), shape=one, dimension=0)
    whole = Type(type.dtype, table.shape)
    (name,) = graph.add("param", (), whole, params={"value": graph.constant(table, "table")})
    name = graph.one("lax.slice", [name], type, start=(0,) * len(one), limit=one)
    if one == shape:
        return name
    return graph.one(
        "lax.broadcast_in_dim", [name], Type(type.dtype, shape), shape=shape, dims=tuple(range(len(shape)))
    )
