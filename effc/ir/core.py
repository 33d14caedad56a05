"""The IR's data: immutable, names are references, so equality and diff are plain `==`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from effc.ir.types import Dim, Size, Type

Attr = bool | int | float | str | None | Dim | Type | tuple["Attr", ...]
"""An attribute: a literal, a size formula, a type, a word, or a tuple of these."""

NAN = float("nan")
"""The one NaN attributes use: containers compare it by identity, so dumps round-trip."""


@dataclass(frozen=True)
class Ref:
    """An attribute that names a function, block or parameter of the module: `@layer`."""

    name: str

    def __str__(self) -> str:
        return f"@{self.name}"


@dataclass(frozen=True)
class Loc:
    """Where an op came from: path of the Flax module, source file and line."""

    module: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else ""
        return " in ".join(part for part in (place, self.module) if part)


@dataclass(frozen=True)
class Value:
    """A name and its type: an input, or what an op defines."""

    name: str
    type: Type

    def __str__(self) -> str:
        return f"%{self.name}: {self.type}"


@dataclass(frozen=True)
class Op:
    """One operation; what its kind takes and means stands in `effc.ir.ops`."""

    kind: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[Value, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict[str, str])  # role -> parameter name
    attrs: Mapping[str, Attr | Ref] = field(default_factory=dict[str, Attr | Ref])
    regions: Mapping[str, Func] = field(default_factory=dict[str, "Func"])
    loc: Loc | None = field(default=None, compare=False)

    @property
    def out(self) -> Value:
        """The only output."""
        (value,) = self.outputs
        return value


@dataclass(frozen=True)
class Func:
    """Ops in order, from `inputs` to `results`. A block is a func that `repeat` runs."""

    name: str
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    results: tuple[str, ...]
    block: bool = False

    def types(self) -> dict[str, Type]:
        """Type of every value by name."""
        known = {value.name: value.type for value in self.inputs}
        return known | {value.name: value.type for op in self.ops for value in op.outputs}

    def result_types(self) -> tuple[Type, ...]:
        """Types of the results."""
        known = self.types()
        return tuple(known[name] for name in self.results)


@dataclass(frozen=True)
class Param:
    """A named array: its type, and which arrays of the checkpoint it is made of.

    `stack` > 0: one array of `type` for each layer of a repeated block, stored on a new first
    axis. A `*` in `path` stands for each number of `over` (start, stop, step; 0..stack by
    default); `[3]` at the end of a path takes one slice of the checkpoint's array. Each array is
    transposed by `perm`, then reshaped to `type`. Where a pass made new arrays, `path` says of what.
    """

    name: str
    type: Type
    stack: int = 0
    path: str = ""
    over: tuple[int, int, int] | None = None
    perm: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Number of arrays of `type` it holds."""
        return self.stack or 1


@dataclass(frozen=True)
class Decode:
    """How text is generated: a strategy (`greedy`, `speculative`, ...) and its settings."""

    strategy: str
    attrs: Mapping[str, Attr | Ref] = field(default_factory=dict[str, Attr | Ref])


@dataclass(frozen=True)
class Module:
    """A program: parameters by name, functions by name, and the decoding strategy."""

    name: str
    meta: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    params: Mapping[str, Param] = field(default_factory=dict[str, Param])
    funcs: Mapping[str, Func] = field(default_factory=dict[str, Func])
    decode: Decode | None = None

    def with_func(self, func: Func) -> Module:
        """The module with `func` in place of the one of its name."""
        return replace(self, funcs={**self.funcs, func.name: func})

    def with_params(self, *params: Param) -> Module:
        """The module with these parameters added or replaced."""
        return replace(self, params={**self.params, **{p.name: p for p in params}})

    def forward(self) -> Func:
        """The function from tokens to logits that `decode` names."""
        ref = self.decode.attrs.get("forward") if self.decode else None
        return self.funcs[ref.name if isinstance(ref, Ref) else "forward"]


def walk(func: Func) -> Iterator[Op]:
    """Every op of `func`, ops inside regions included."""
    for op in func.ops:
        yield op
        for region in op.regions.values():
            yield from walk(region)


def all_ops(module: Module) -> Iterator[tuple[Func, Op]]:
    """Every op of the module with the function or block that holds it."""
    for func in module.funcs.values():
        for op in walk(func):
            yield func, op


def param_uses(module: Module) -> dict[str, list[tuple[Func, Op, str]]]:
    """For every parameter the ops that read it, with the role it plays there."""
    uses: dict[str, list[tuple[Func, Op, str]]] = {name: [] for name in module.params}
    for func, op in all_ops(module):
        for role, name in op.params.items():
            uses.setdefault(name, []).append((func, op, role))
    return uses


__all__ = [
    "NAN", "Attr", "Decode", "Dim", "Func", "Loc", "Module", "Op", "Param", "Ref", "Size", "Type",
    "Value", "all_ops", "param_uses", "walk",
]  # fmt: skip
