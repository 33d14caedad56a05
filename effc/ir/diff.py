"""What changed between two modules: text for people, counts of ops for the pass runner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher

from effc.ir.core import Func, Module, Op, Param, Value
from effc.ir.printer import (
    attr_text,
    decode_line,
    head_line,
    op_lines,
    param_line,
    ref,
    return_line,
    type_text,
)

CONTEXT = 2
"""Unchanged lines shown around a change; more are folded to a count."""


def diff(before: Module, after: Module) -> str:
    """Lines marked `-`, `+` or `~` (a parameter's type), function by function; empty where equal."""
    parts = [
        *_name(before, after),
        *_section("meta", _mapping(_meta(before), _meta(after))),
        *_section("params", _params(before.params, after.params)),
        *_funcs(before.funcs, after.funcs),
        *_section("decode", _mapping(_decode(before), _decode(after))),
    ]
    return "\n".join(parts) + "\n" if parts else ""


@dataclass(frozen=True)
class Delta:
    """Ops of one function by kind. `rewired`: the same op on other operands, which is no change of it."""

    added: Counter[str] = field(default_factory=Counter[str])
    removed: Counter[str] = field(default_factory=Counter[str])
    altered: Counter[str] = field(default_factory=Counter[str])
    rewired: Counter[str] = field(default_factory=Counter[str])

    def touched(self) -> frozenset[str]:
        """Kinds added, removed or altered."""
        return frozenset([*self.added, *self.removed, *self.altered])


def deltas(before: Module, after: Module) -> dict[str, Delta]:
    """For each function that changed, what happened to its ops."""
    empty = Func("", (), (), ())
    names = list(dict.fromkeys([*before.funcs, *after.funcs]))
    found = {n: delta(before.funcs.get(n, empty), after.funcs.get(n, empty)) for n in names}
    return {name: change for name, change in found.items() if change != Delta()}


def touched(before: Module, after: Module) -> frozenset[str]:
    """Op kinds that were added, removed or altered anywhere in the module."""
    return frozenset().union(*(change.touched() for change in deltas(before, after).values()))


def delta(before: Func, after: Func) -> Delta:
    """Ops matched first by what they are, names aside, then by the values they define."""
    old, new = _unmatched(before, after), _unmatched(after, before)
    rewired = _rewired(before, after)
    named = {(op.kind, op.outputs[0].name): op for op in new if op.outputs}
    altered = [op for op in old if op.outputs and (op.kind, op.outputs[0].name) in named]
    count = Counter(op.kind for op in altered)
    added, removed = Counter(op.kind for op in new), Counter(op.kind for op in old)
    return Delta(added - count, removed - count, count, rewired)


def _unmatched(these: Func, others: Func) -> list[Op]:
    """Ops of `these` that are in excess of equal ops of `others`."""
    left = Counter(_nameless(op) for op in others.ops)
    same = {op_text(op) for op in others.ops}
    out: list[Op] = []
    # an op that did not move at all takes its match before one that only looks like it
    for op in sorted(these.ops, key=lambda op: op_text(op) not in same):
        key = _nameless(op)
        if left[key]:
            left[key] -= 1
        else:
            out.append(op)
    return out


def _rewired(before: Func, after: Func) -> Counter[str]:
    old = {value.name: op for op in before.ops for value in op.outputs}
    pairs = [(old[op.outputs[0].name], op) for op in after.ops if op.outputs and op.outputs[0].name in old]
    return Counter(q.kind for p, q in pairs if p.inputs != q.inputs and _nameless(p) == _nameless(q))


def op_text(op: Op) -> str:
    """The op with its regions as one text."""
    return "\n".join(op_lines(op))


def _nameless(op: Op) -> str:
    """The op's text without the names of values."""
    outputs = tuple(Value("_", value.type) for value in op.outputs)
    return op_text(replace(op, inputs=("_",) * len(op.inputs), outputs=outputs))


# -- text ---------------------------------------------------------------------------------------------------


def _name(before: Module, after: Module) -> Iterator[str]:
    if before.name != after.name:
        yield f"module {ref(before.name)} -> {ref(after.name)}"


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    body = [f"  {line}" for line in lines]
    if body:
        yield f"{title}:"
        yield from body


def _meta(module: Module) -> dict[str, str]:
    return {name: f"{name}={attr_text(value)}" for name, value in module.meta.items()}


def _decode(module: Module) -> dict[str, str]:
    return {"": decode_line(module.decode)} if module.decode else {}


def _mapping(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            yield from (f"- {before[name]}" for _ in range(name in before))
            yield from (f"+ {after[name]}" for _ in range(name in after))


def _params(before: Mapping[str, Param], after: Mapping[str, Param]) -> Iterator[str]:
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old is None or new is None or replace(old, type=new.type) != new:
            lines = [{name: param_line(p)} if p else {} for p in (old, new)]
            yield from _mapping(*lines)
        elif old != new:
            stack = f"{new.stack} * " if new.stack else ""
            yield f"~ param {ref(name)}: {stack}{type_text(old.type)} -> {type_text(new.type)}"


def _funcs(before: Mapping[str, Func], after: Mapping[str, Func]) -> Iterator[str]:
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old != new:
            head = head_line(new or old or Func(name, (), (), ())).removesuffix(" {")
            mark = "" if old and new else "+ " if new else "- "
            yield from _section(mark + head, _changes(old, new))


def _changes(before: Func | None, after: Func | None) -> Iterator[str]:
    if before and after and head_line(before) != head_line(after):
        yield from (f"- {head_line(before)}", f"+ {head_line(after)}")
    yield from _folded(_lines(before), _lines(after))


def _lines(func: Func | None) -> list[str]:
    """A function's lines without its head."""
    return [line for op in func.ops for line in op_lines(op)] + [return_line(func)] if func else []


def _folded(before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    """Both sides line by line; long runs of unchanged lines become their number."""
    codes = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    for at, (tag, i, j, k, m) in enumerate(codes):
        if tag == "equal":
            yield from _unchanged(before[i:j], at == 0, at == len(codes) - 1)
        else:
            yield from (f"- {line}" for line in before[i:j])
            yield from (f"+ {line}" for line in after[k:m])


def _unchanged(lines: Sequence[str], first: bool, last: bool) -> Iterator[str]:
    head, tail = (0 if first else CONTEXT), (0 if last else CONTEXT)
    hidden = len(lines) - head - tail
    if hidden < 2:
        yield from (f"  {line}" for line in lines)
        return
    yield from (f"  {line}" for line in lines[:head])
    yield f"  ... {hidden} lines the same"
    yield from (f"  {line}" for line in lines[len(lines) - tail :])


__all__ = ["CONTEXT", "Delta", "delta", "deltas", "diff", "touched"]
