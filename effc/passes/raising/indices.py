"""Where the elements of a moved value come from: indices into the operand of a broadcast or a transpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from effc.ir.core import Op

X = TypeVar("X")


def into_operand(op: Op, index: Sequence[X]) -> tuple[X, ...]:
    """The index into the operand, given the one into the result, an entry an axis."""
    if op.kind == "lax.broadcast_in_dim":
        dims = op.attrs["dims"]
        assert isinstance(dims, tuple)
        return tuple(index[d] for d in dims)  # type: ignore[index, call-overload]
    order = op.attrs["permutation"]
    assert isinstance(order, tuple)
    return tuple(index[order.index(axis)] for axis in range(len(order)))
