"""A function while it is being rewritten: ops by what they define, order found again at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from effc.ir.core import Attr, Func, Loc, Op, Param, Ref, Value
from effc.ir.types import FROM_NUMPY, Type


@dataclass
class Graph:
    """Ops keyed by their outputs. `become` redirects every use of a value, wherever it stands."""

    inputs: list[Value] = field(default_factory=list[Value])
    results: list[str] = field(default_factory=list[str])
    params: dict[str, Param] = field(default_factory=dict[str, Param])
    ops: dict[str, Op] = field(default_factory=dict[str, Op])  # any output's name -> its op
    types: dict[str, Type] = field(default_factory=dict[str, Type])
    constants: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])  # by a parameter's path
    memo: dict[str, dict[str, Any]] = field(default_factory=dict[str, "dict[str, Any]"])  # answers of raising
    _alias: dict[str, str] = field(default_factory=dict[str, str])
    _count: int = 0

    def input(self, name: str, type: Type) -> str:
        """Declare an operand of the function."""
        self.inputs.append(Value(name, type))
        self.types[name] = type
        return name

    def find(self, name: str) -> str:
        """What `name` is now called, after all redirections."""
        while name in self._alias:
            name = self._alias[name]
        return name

    def add(
        self, kind: str, inputs: Sequence[str] = (), types: Type | Sequence[Type] = (), *,
        params: Mapping[str, str] | None = None, attrs: Mapping[str, Attr | Ref] | None = None,
        regions: Mapping[str, Func] | None = None, loc: Loc | None = None,
    ) -> list[str]:  # fmt: skip
        """A new op; returns the names of its outputs."""
        outputs = [Value(self._fresh(), t) for t in ([types] if isinstance(types, Type) else types)]
        op = Op(kind, tuple(map(self.find, inputs)), tuple(outputs), params or {}, attrs or {}, regions or {}, loc)
        for value in outputs:
            self.ops[value.name] = op
            self.types[value.name] = value.type
        return [value.name for value in outputs]

    def one(self, kind: str, inputs: Sequence[str], type: Type, loc: Loc | None = None, **attrs: Attr) -> str:
        """A new op with one output and no parameters."""
        return self.add(kind, inputs, type, attrs=attrs, loc=loc)[0]

    def constant(self, array: np.ndarray, hint: str = "const") -> str:
        """The name of a parameter that is a fixed array, one for equal arrays."""
        for path, known in self.constants.items():
            if known.shape == array.shape and known.dtype == array.dtype and np.array_equal(known, array):
                return path.replace("/", ".")
        path = f"{hint}/{len(self.constants)}"
        self.constants[path] = array
        name = path.replace("/", ".")
        self.params[name] = Param(name, Type(FROM_NUMPY[array.dtype.name], array.shape), path=path)
        return name

    def become(self, old: str, new: str) -> None:
        """Every use of `old` becomes a use of `new`."""
        old, new = self.find(old), self.find(new)
        if old != new:
            self._alias[old] = new

    def op(self, name: str) -> Op | None:
        """The op that defines a value, operands resolved; None for an input."""
        found = self.ops.get(self.find(name))
        if found is None or all(i not in self._alias for i in found.inputs):
            return found
        found = replace(found, inputs=tuple(map(self.find, found.inputs)))
        self.ops.update((value.name, found) for value in found.outputs)
        return found

    def kind(self, name: str) -> str:
        """Kind of the op that defines a value; empty for an input."""
        op = self.op(name)
        return op.kind if op else ""

    def type(self, name: str) -> Type:
        """Type of a value."""
        return self.types[self.find(name)]

    def order(self, roots: Iterable[str] | None = None) -> list[Op]:
        """Live ops, each after what it needs, as near as can be to the order they were made in."""
        live: dict[str, Op] = {}
        stack = [self.find(r) for r in (self.results if roots is None else roots)]
        while stack:
            op = self.op(stack.pop())
            if op and op.outputs[0].name not in live:
                live[op.outputs[0].name] = op
                stack.extend(op.inputs)
        done: set[str] = set()
        ordered: list[Op] = []
        for first in sorted(live, key=_number):
            ordered.extend(self._before(live[first], done))
        return ordered

    def _before(self, op: Op, done: set[str]) -> Iterator[Op]:
        """`op` after those of its operands that are not `done`, without recursion."""
        stack: list[tuple[Op, int]] = [(op, 0)]
        while stack:
            current, at = stack.pop()
            if current.outputs[0].name in done:
                continue
            if at == len(current.inputs):
                done.update(value.name for value in current.outputs)
                yield current
                continue
            stack.append((current, at + 1))
            needed = self.op(current.inputs[at])
            if needed and needed.outputs[0].name not in done:
                stack.append((needed, 0))

    def users(self) -> dict[str, list[Op]]:
        """Live ops that read each value."""
        out: dict[str, list[Op]] = {}
        for op in self.order():
            for name in dict.fromkeys(op.inputs):
                out.setdefault(name, []).append(op)
        return out

    def func(self, name: str) -> Func:
        """The function as it stands now."""
        results = tuple(map(self.find, self.results))
        return Func(name, tuple(self.inputs), tuple(self.order()), results)

    def _fresh(self) -> str:
        self._count += 1
        return f"v{self._count}"


def _number(name: str) -> int:
    return int(name[1:])
