"""Fold literals, merge equal ops, drop what does nothing and what nobody reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from effc.ir.core import Attr, Func, Module, Op, Ref, all_ops
from effc.ir.types import Type
from effc.passes.base import Exactness, Notes, Pass, Phase
from effc.passes.fold_const import folded

SAME_SHAPE = frozenset({"lax.reshape", "lax.broadcast_in_dim", "lax.squeeze", "lax.expand_dims"})
COPIES = frozenset(
    {"lax.copy", "lax.copy_p", "lax.stop_gradient", "lax.convert_element_type", "lax.optimization_barrier"}
)
NEUTRAL: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "lax.mul": (1, (0, 1)), "lax.add": (0, (0, 1)), "lax.sub": (0, (1,)), "lax.div": (1, (1,)),
}  # fmt: skip
"""Literal that leaves the other operand as it is, and the places it may stand in."""


@dataclass(frozen=True)
class Clean(Pass):
    """Folds literals, merges equal ops, drops no-op reshapes and converts, dead ops and unused parameters."""

    name: ClassVar[str] = "clean"
    phase: ClassVar[Phase] = Phase.CLEAN
    exactness: ClassVar[Exactness] = Exactness.EXACT
    writes: ClassVar[frozenset[str]] = frozenset({"*"})

    def run(self, module: Module, notes: Notes) -> Module:
        after = _reachable(replace(module, funcs={n: _settled(f) for n, f in module.funcs.items()}))
        after = _used_params(after)
        _tell(module, after, notes)
        return after


def _settled(func: Func) -> Func:
    """Simplified until nothing changes: a merge makes more ops equal, a fold makes more ops dead."""
    while True:
        after = _live(_simplified(func))
        if after == func:
            return func
        func = after


def _simplified(func: Func) -> Func:
    """One sweep: each op with its operands renamed, then folded, dropped or merged."""
    types = func.types()
    names: dict[str, str] = {}  # value -> the equal value that stays
    literals: dict[str, Attr] = {}
    kept: list[Op] = []
    index: dict[str, list[Op]] = {}
    for op in func.ops:
        op = _renamed(op, names)
        op = _literal(op, literals, types)
        same = _operand(op, literals, types)
        if same is not None:
            names[op.out.name] = same
            continue
        twin = next((k for k in index.get(_key(op), []) if _equal(k, op)), None)
        if twin is not None:
            names.update(zip((v.name for v in op.outputs), (v.name for v in twin.outputs), strict=True))
            continue
        if op.kind == "const":
            literals[op.out.name] = _plain(op.attrs["value"])
        index.setdefault(_key(op), []).append(op)
        kept.append(op)
    return replace(func, ops=tuple(kept), results=tuple(names.get(r, r) for r in func.results))


def _renamed(op: Op, names: Mapping[str, str]) -> Op:
    regions = {n: _settled(f) for n, f in op.regions.items()}
    return replace(op, inputs=tuple(names.get(i, i) for i in op.inputs), regions=regions)


def _literal(op: Op, literals: Mapping[str, Attr], types: Mapping[str, Type]) -> Op:
    """The op as a literal, where all its operands are."""
    if op.regions or len(op.outputs) != 1 or any(i not in literals for i in op.inputs):
        return op
    value = folded(op, [literals[i] for i in op.inputs], [types[i] for i in op.inputs])
    return op if value is None else Op("const", (), op.outputs, {}, {"value": value}, {}, op.loc)


def _operand(op: Op, literals: Mapping[str, Attr], types: Mapping[str, Type]) -> str | None:
    """The operand that the op gives back unchanged, if there is one."""
    if len(op.outputs) != 1 or not op.inputs:
        return None
    first, out = op.inputs[0], op.out.type
    if len(op.inputs) == 1 and types[first] == out and _does_nothing(op):
        return first
    if op.kind in NEUTRAL and len(op.inputs) == 2:
        return _beside_neutral(op, literals, types)
    return None


def _does_nothing(op: Op) -> bool:
    """Whether an op of equal input and output types moves no element."""
    if op.kind == "lax.transpose":
        order = op.attrs.get("permutation")
        return isinstance(order, tuple) and order == tuple(range(len(order)))
    return op.kind in SAME_SHAPE | COPIES


def _beside_neutral(op: Op, literals: Mapping[str, Attr], types: Mapping[str, Type]) -> str | None:
    literal, places = NEUTRAL[op.kind]
    for place in places:
        other = op.inputs[1 - place]
        value = literals.get(op.inputs[place])
        if value == literal and not isinstance(value, bool) and types[other] == op.out.type:
            return other
    return None


def _key(op: Op) -> str:
    return f"{op.kind}({','.join(op.inputs)})"


def _equal(one: Op, two: Op) -> bool:
    """Same op but for its outputs' names. Literals are compared as written: 1 is not 1.0, -0.0 is not 0.0."""
    types = [[v.type for v in op.outputs] for op in (one, two)]
    return (
        types[0] == types[1]
        and one.params == two.params
        and repr(one.attrs) == repr(two.attrs)
        and one.regions == two.regions
    )


def _plain(value: Attr | Ref) -> Attr:
    return None if isinstance(value, Ref) else value


def _live(func: Func) -> Func:
    """Without the ops whose outputs nobody reads."""
    wanted = set(func.results)
    kept: list[Op] = []
    for op in reversed(func.ops):
        if any(value.name in wanted for value in op.outputs):
            kept.append(op)
            wanted |= {*op.inputs, *_captured(op)}
    return replace(func, ops=tuple(reversed(kept)))


def _captured(op: Op) -> Iterator[str]:
    """Every name its regions mention: more than they capture, which only keeps an op too many."""
    for region in op.regions.values():
        yield from region.results
        for inner in region.ops:
            yield from inner.inputs
            yield from _captured(inner)


def _reachable(module: Module) -> Module:
    """Without functions that neither the decoding nor a kept function names; all, where nothing is decoded."""
    if module.decode is None:
        return module
    found: set[str] = set()
    wanted = [module.forward().name, *_refs(module.decode.attrs.values())]
    while wanted:
        name = wanted.pop()
        if name in module.funcs and name not in found:
            found.add(name)
            only = Module("", funcs={name: module.funcs[name]})
            wanted += [n for _, op in all_ops(only) for n in _refs(op.attrs.values())]
    return replace(module, funcs={n: f for n, f in module.funcs.items() if n in found})


def _refs(values: Iterable[Attr | Ref]) -> Iterator[str]:
    """Names that attributes refer to, tuples looked into."""
    for value in values:
        if isinstance(value, Ref):
            yield value.name
        elif isinstance(value, tuple):
            yield from _refs(value)


def _used_params(module: Module) -> Module:
    used = {name for _, op in all_ops(module) for name in [*op.params.values(), *_refs(op.attrs.values())]}
    used |= set(_refs(module.decode.attrs.values())) if module.decode else set()
    return replace(module, params={n: p for n, p in module.params.items() if n in used})


def _tell(before: Module, after: Module, notes: Notes) -> None:
    ops = [sum(1 for _ in all_ops(m)) for m in (before, after)]
    if ops[0] != ops[1]:
        notes.chose(f"{ops[0] - ops[1]} of {ops[0]} ops dropped, folded or merged")
    gone = [n for n in before.params if n not in after.params]
    if gone:
        notes.chose(f"{len(gone)} unused parameters dropped: {', '.join(gone[:5])}{' ...' if len(gone) > 5 else ''}")
    if before == after:
        notes.skip("module", "nothing to fold, merge or drop")
