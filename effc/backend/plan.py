"""What an emitted program is made of: places of parameters, blocks, where rows can be dropped."""

from __future__ import annotations

from dataclasses import dataclass, field

from effc.errors import EffcError, nearest
from effc.ir.core import Func, Module, Op, Param, Ref, walk
from effc.ir.types import Dim, Type, depends

CACHED = frozenset({"positions", "attention", "window"})
"""Ops that need to know what came before."""


@dataclass(frozen=True)
class Block:
    """What a call of an emitted block passes besides its operands."""

    title: str
    group: str  # key of its stacked parameters in `params`; "" where it has none
    shared: bool  # reads unstacked parameters
    steps: bool  # reads or writes the cache

    def arguments(self) -> tuple[list[str], list[str]]:
        """Before and after the operands."""
        before = ["p"] * bool(self.group) + ["params"] * self.shared
        return before, ["step"] * self.steps


@dataclass
class Plan:
    """One module on its way to Python; `used` gathers the names to import."""

    module: Module
    used: set[str] = field(default_factory=set[str])
    blocks: dict[str, Block] = field(default_factory=dict[str, Block])

    def __post_init__(self) -> None:
        self.tree = tree(self.module)

    def param(self, name: str) -> Param:
        """EffcError where there is no such parameter."""
        if name not in self.module.params:
            raise EffcError(f"emit: no parameter @{name}{nearest(name, self.module.params)}")
        return self.module.params[name]

    def place(self, name: str) -> tuple[str, str]:
        """Group and key of a parameter in the program's `params`; group "" where it is not stacked."""
        self.param(name)
        return self.tree[name]

    def block(self, func: Func, title: str) -> Block:
        """What calls of `func` need, kept under its name."""
        names = [name for op in walk(func) for name in op.params.values()]
        stacked = [name for name in names if self.param(name).stack]
        group = self.place(stacked[0])[0] if stacked else ""
        nested = any(op.kind == "repeat" for op in walk(func))
        shared = nested or len(stacked) < len(names)
        self.blocks[func.name] = Block(title, group, shared, steps(self.module, func))
        return self.blocks[func.name]


def tree(module: Module) -> dict[str, tuple[str, str]]:
    """Group and key of every parameter: `layers.attn.q` is `params["layers"][i]["attn.q"]`."""
    out = {name: ("", name) for name, param in module.params.items() if not param.stack}
    for func in module.funcs.values():
        mine = [n for op in walk(func) for n in op.params.values() if n in module.params and module.params[n].stack]
        heads = {name.partition(".")[0] for name in mine}
        shared = len(heads) == 1 and all("." in name for name in mine) and not heads & out.keys()
        for name in mine:
            head, _, rest = name.partition(".")
            out.setdefault(name, (head, rest) if shared else (func.name, name))
    unread = [name for name in module.params if name not in out]
    return out | {name: ("unread", name) for name in unread}


def reached(module: Module, func: Func) -> list[Func]:
    """Blocks that `func` repeats, those they repeat first."""
    out: dict[str, Func] = {}
    for op in walk(func):
        target = op.attrs.get("block")
        if op.kind == "repeat" and isinstance(target, Ref):
            if target.name not in module.funcs:
                hint = nearest(target.name, module.funcs)
                raise EffcError(f"emit: @{func.name} repeats @{target.name}, want a block{hint}")
            block = module.funcs[target.name]
            out |= {inner.name: inner for inner in reached(module, block)}
            out[block.name] = block
    return list(out.values())


def steps(module: Module, func: Func) -> bool:
    """Whether it, or a block that it runs, needs to know what came before."""
    return any(op.kind in CACHED for inner in [func, *reached(module, func)] for op in walk(inner))


def last_mixing(module: Module, func: Func) -> int:
    """How many ops there are up to the last that mixes tokens or tells positions."""
    blocks = {block.name: steps(module, block) for block in reached(module, func)}

    def mixes(op: Op) -> bool:
        target = op.attrs.get("block")
        return op.kind in CACHED or (isinstance(target, Ref) and blocks[target.name])

    return max((i + 1 for i, op in enumerate(func.ops) if mixes(op)), default=0)


def by_call(type_: Type) -> bool:
    """Whether its shape depends on the number of tokens of the call."""
    return any(depends(size, "t") for size in type_.shape)


def by_token(type_: Type) -> bool:
    """Whether it is [b,t,...] with nothing else that depends on t."""
    head, rest = type_.shape[:2], type_.shape[2:]
    return [str(size) for size in head] == ["b", "t"] and not any(depends(size, "t") for size in rest)


def reads(op: Op) -> list[str]:
    """Values an op reads, through its regions too."""
    return [
        *op.inputs,
        *(name for region in op.regions.values() for inner in region.ops for name in reads(inner)),
    ]


def mentions(op: Op, size: str) -> bool:
    """Whether the emitted text of an op names the size."""
    shapes = (op.out.type.shape,) if op.kind == "const" else ()
    return any(_names(value, size) for value in (*op.attrs.values(), *shapes))


def _names(value: object, size: str) -> bool:
    if isinstance(value, tuple):
        return any(_names(item, size) for item in value)
    return isinstance(value, Dim) and depends(value, size)
