"""What an emitted program is made of: places of parameters, blocks, where rows can be dropped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from effc.errors import EffcError, nearest
from effc.ir.core import Func, Module, Op, Param, Ref, walk
from effc.ir.types import Dim, Type, depends

CACHED = frozenset({"positions", "attention", "window", "running", "recur", "keep", "early"})
"""Ops that need to know what came before."""


@dataclass(frozen=True)
class Block:
    """What a call of an emitted block or function passes besides its operands."""

    title: str
    groups: tuple[str, ...]  # keys of its stacked parameters in `params`
    shared: bool  # reads other parameters, or runs functions that may
    steps: bool  # reads or writes the cache

    def arguments(self) -> tuple[list[str], list[str]]:
        """Before and after the operands."""
        before = [*self.layer_names().values()] + ["params"] * self.shared
        return before, ["step"] * self.steps

    def layer_names(self) -> dict[str, str]:
        """By group, what the parameters of one layer are called: `p` where there is one group only."""
        if len(self.groups) == 1:
            return {self.groups[0]: "p"}
        return {group: f"p_{re.sub(r'[^A-Za-z0-9_]', '_', group)}" for group in self.groups}


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
        groups = tuple(dict.fromkeys(self.place(name)[0] for name in stacked))
        runs_others = any(isinstance(value, Ref) for op in walk(func) for value in op.attrs.values())
        shared = runs_others or len(stacked) < len(names)
        self.blocks[func.name] = Block(title, groups, shared, steps(self.module, func))
        return self.blocks[func.name]

    def length(self, group: str) -> int:
        """How many layers a group has."""
        return max(p.stack for name, p in self.module.params.items() if self.tree[name][0] == group)


def tree(module: Module) -> dict[str, tuple[str, str]]:
    """Group and key of every parameter: `layers.attn.q` is `params["layers"][i]["attn.q"]`."""
    out = {name: ("", name) for name, param in module.params.items() if not param.stack}
    for func in module.funcs.values():
        for name in (n for op in walk(func) for n in op.params.values()):
            if name in module.params and name not in out:
                head, _, rest = name.partition(".")
                out[name] = (head, rest) if rest and head not in module.params else (func.name, name)
    out = _by_length(module, out)
    unread = [name for name in module.params if name not in out]
    return out | {name: ("unread", name) for name in unread}


def _by_length(module: Module, places: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Where layers share arrays: what every layer has of its own in a group beside the shorter shared one."""
    lengths: dict[str, set[int]] = {}
    for name, (group, _) in places.items():
        lengths.setdefault(group, set()).add(module.params[name].stack)

    def placed(name: str, group: str, key: str) -> tuple[str, str]:
        longer = module.params[name].stack > min(lengths[group])
        return (f"{group}_own", key) if group and longer else (group, key)

    return {name: placed(name, *place) for name, place in places.items()}


def entries(module: Module) -> list[Func]:
    """Functions that `decode` names beside the forward one: a drafter, for instance."""
    named = module.decode.attrs.values() if module.decode else ()
    found = [module.funcs[ref.name] for ref in named if isinstance(ref, Ref) and ref.name in module.funcs]
    main = module.forward().name
    return list({func.name: func for func in found if func.name != main}.values())


def reached(module: Module, func: Func) -> list[Func]:
    """Blocks and functions that `func` runs, those they run first."""
    out: dict[str, Func] = {}
    for op in walk(func):
        for target in (value for value in op.attrs.values() if isinstance(value, Ref)):
            if target.name not in module.funcs:
                hint = nearest(target.name, module.funcs)
                raise EffcError(f"emit: @{func.name} runs @{target.name}, want a block or a func{hint}")
            inner = module.funcs[target.name]
            out |= {deeper.name: deeper for deeper in reached(module, inner)}
            out[inner.name] = inner
    return list(out.values())


def steps(module: Module, func: Func) -> bool:
    """Whether it, or a block that it runs, needs to know what came before."""
    return any(op.kind in CACHED for inner in [func, *reached(module, func)] for op in walk(inner))


def last_mixing(module: Module, func: Func) -> int:
    """How many ops there are up to the last that mixes tokens or tells positions."""
    blocks = {block.name: steps(module, block) for block in reached(module, func)}

    def mixes(op: Op) -> bool:
        runs = any(isinstance(value, Ref) and blocks[value.name] for value in op.attrs.values())
        return op.kind in CACHED or runs

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
    """Whether the emitted text of an op names the size, that of a primitive's regions included."""
    inner = [o for r in op.regions.values() for o in r.ops] if op.kind.startswith("lax.") else []
    if any(mentions(o, size) for o in inner):
        return True
    shapes = (op.out.type.shape,) if op.kind == "const" else ()
    return any(_names(value, size) for value in (*op.attrs.values(), *shapes))


def _names(value: object, size: str) -> bool:
    if isinstance(value, tuple):
        return any(_names(item, size) for item in value)
    return isinstance(value, Dim) and depends(value, size)
