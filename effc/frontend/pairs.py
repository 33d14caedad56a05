"""Complex numbers at import: each value is two real ones, so that no later step knows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from effc.frontend.graph import Graph
from effc.ir.core import Attr, Loc
from effc.ir.types import Type


class Pair(NamedTuple):
    """The names of a complex value's real and imaginary part."""

    re: str
    im: str


Part = Callable[[Sequence[str]], list[str]]
"""Imports the equation for one part: names of real operands -> names of real results."""


def is_complex(dtype: Any) -> bool:
    """Whether arrays of this dtype are pairs in the IR."""
    return str(dtype).startswith("complex")


def paired(graph: Graph, name: str, operands: Sequence[str | Pair], part: Part, loc: Loc) -> list[str | Pair] | None:
    """Results of a primitive that reads or makes complex numbers; None for one without a rule."""
    rule = RULES.get(name)
    if rule is not None:
        return [rule(graph, operands, loc)]
    if name not in BY_PARTS:
        return None
    both = [_pair(graph, x) if is_float(graph, x) else x for x in operands]
    re, im = (part([x[side] if isinstance(x, Pair) else x for x in both]) for side in (0, 1))
    return [Pair(x, y) for x, y in zip(re, im, strict=True)]


def is_float(graph: Graph, x: str | Pair) -> bool:
    """Indices and choices are no part of a pair."""
    return isinstance(x, Pair) or str(graph.type(x).dtype).startswith("f")


BY_PARTS = frozenset({
    "add", "sub", "neg", "reshape", "transpose", "broadcast_in_dim", "slice", "squeeze", "gather", "dynamic_slice",
    "concatenate", "stack", "select_n", "rev", "split", "tile", "pad", "reduce_sum",
})  # fmt: skip
"""Primitives that act on real and imaginary parts alike."""


def _pair(graph: Graph, x: str | Pair) -> Pair:
    """A real number as a complex one."""
    return x if isinstance(x, Pair) else Pair(x, graph.one("const", (), graph.type(x), value=0.0))


def _zero(graph: Graph, name: str) -> bool:
    op = graph.op(name)
    return op is not None and op.kind == "const" and op.attrs["value"] == 0


class _Sums:
    """Real arithmetic, terms that are 0 left out."""

    def __init__(self, graph: Graph, loc: Loc) -> None:
        self.graph, self.loc = graph, loc

    def wide(self, x: str, y: str) -> Type:
        """The type of x and y together; a literal stretches."""
        return max((self.graph.type(x), self.graph.type(y)), key=lambda type: len(type.shape))

    def op(self, kind: str, x: str, y: str) -> str:
        return self.graph.one(f"lax.{kind}", [x, y], self._broad(x, y), self.loc)

    def _broad(self, x: str, y: str) -> Type:
        a, b = self.graph.type(x), self.graph.type(y)
        if not a.shape or not b.shape:
            return self.wide(x, y)
        shape = tuple(n if m == 1 else m for n, m in zip(a.shape, b.shape, strict=True))
        return Type(a.dtype, shape)

    def mul(self, x: str, y: str) -> str:
        """x * y."""
        if _zero(self.graph, x) or _zero(self.graph, y):
            return self.graph.one("const", (), self._broad(x, y), value=0.0)
        return self.op("mul", x, y)

    def add(self, x: str, y: str) -> str:
        """x + y."""
        if _zero(self.graph, x) or _zero(self.graph, y):
            return y if _zero(self.graph, x) else x
        return self.op("add", x, y)

    def sub(self, x: str, y: str) -> str:
        """x - y."""
        if _zero(self.graph, y):
            return x
        return self.neg(y) if _zero(self.graph, x) else self.op("sub", x, y)

    def neg(self, x: str) -> str:
        """-x."""
        return x if _zero(self.graph, x) else self.one("neg", x)

    def one(self, kind: str, x: str, **attrs: Attr) -> str:
        return self.graph.one(f"lax.{kind}", [x], self.graph.type(x), self.loc, **attrs)


Rule = Callable[[Graph, Sequence[str | Pair], Loc], str | Pair]


def _complex(graph: Graph, operands: Sequence[Any], loc: Loc) -> Pair:
    return Pair(*operands)


def _convert(graph: Graph, operands: Sequence[Any], loc: Loc) -> Pair:
    """A real number of any dtype as a complex one."""
    (x,) = operands
    if not isinstance(x, Pair) and str(graph.type(x).dtype) != "f32":
        x = graph.one("lax.convert_element_type", [x], Type("f32", graph.type(x).shape), loc, dtype="f32")
    return _pair(graph, x)


def _mul(graph: Graph, operands: Sequence[str | Pair], loc: Loc) -> Pair:
    (a, b), (c, d) = (_pair(graph, x) for x in operands)
    s = _Sums(graph, loc)
    return Pair(s.sub(s.mul(a, c), s.mul(b, d)), s.add(s.mul(a, d), s.mul(b, c)))


def _conj(graph: Graph, operands: Sequence[Any], loc: Loc) -> Pair:
    x = _pair(graph, operands[0])
    return Pair(x.re, _Sums(graph, loc).neg(x.im))


def _exp(graph: Graph, operands: Sequence[Any], loc: Loc) -> Pair:
    x, s = _pair(graph, operands[0]), _Sums(graph, loc)
    size = None if _zero(graph, x.re) else s.one("exp", x.re)
    turned = Pair(s.one("cos", x.im), s.one("sin", x.im))
    return turned if size is None else Pair(s.mul(size, turned.re), s.mul(size, turned.im))


RULES: dict[str, Rule] = {
    "complex": _complex, "mul": _mul, "conj": _conj, "exp": _exp, "convert_element_type": _convert,
    "real": lambda graph, operands, loc: _pair(graph, operands[0]).re,
    "imag": lambda graph, operands, loc: _pair(graph, operands[0]).im,
}  # fmt: skip


def halves(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part of a captured array."""
    return np.real(array).copy(), np.imag(array).copy()


def has_pairs(equation: Any, operands: Sequence[Any]) -> bool:
    """Whether an equation reads or makes complex numbers."""
    return any(is_complex(v.aval.dtype) for v in equation.outvars) or any(isinstance(x, Pair) for x in operands)
