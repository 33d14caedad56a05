"""`recurse` as Python: a local function that runs one depth, and the call that routes tokens to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from effc.backend import syntax
from effc.backend.plan import Block, Plan, by_token
from effc.backend.syntax import Expr, Names, Statement, call, code, expr, item, literal
from effc.errors import EffcError
from effc.ir.core import Attr, Op, Ref
from effc.ir.ops import attribute
from effc.ir.types import Type


class Writer(Protocol):
    """The function being written."""

    plan: Plan
    names: Names
    types: dict[str, Type]

    def value(self, name: str) -> Expr: ...
    def param(self, name: str) -> Expr: ...


TOLD = ("times", "capacity", "select", "gate", "alpha", "slack", "kv")


def recurse(writer: Writer, op: Op) -> list[Statement]:
    """x1 = recurse(x, cos): def depth(number, step, x, cos): ...; x1 = recurse(step, depth, router, x, cos)."""
    target = op.attrs["block"]
    assert isinstance(target, Ref)
    writer.plan.used.add("recurse")
    block, along = writer.plan.blocks[target.name], [by_token(writer.types[name]) for name in op.inputs]
    title = writer.names.fresh("depth")
    names = [writer.names.fresh(name) for name, moves in zip(op.inputs, along, strict=True) if moves]
    function = _depth(writer, op, block, title, names, along)
    rows = [writer.value(name) for name, moves in zip(op.inputs, along, strict=True) if moves]
    args = [syntax.name("step"), syntax.name(title), writer.param(op.params["router"]), *rows]
    told = {name: literal(op.attrs[name]) for name in TOLD if name in op.attrs}
    return [function, syntax.assign([writer.names.new(op.out.name)], call("recurse", args, told))]


def _depth(writer: Writer, op: Op, block: Block, title: str, names: list[str], along: Sequence[bool]) -> Statement:
    """The layers of one depth, on operands that go with their tokens; the others are those outside."""
    moving = iter(names)
    operands = [syntax.name(next(moving)) if m else writer.value(n) for n, m in zip(op.inputs, along, strict=True)]
    before, after = block.arguments()
    args = [*map(syntax.name, before), *operands, *map(syntax.name, after)]
    over = [_layers(writer, group, op) for group in block.groups]
    if not over:
        raise EffcError(
            f"emit: the layers of @{op.attrs['block']} have no parameters of their own, want some to recurse"
        )
    body = [syntax.assign([names[0]], call(block.title, args))]
    loop = syntax.loop(list(block.layer_names().values()), over[0] if len(over) == 1 else call("zip", over), body)
    return syntax.function(title, ["number", "step", *names], [loop, syntax.give([syntax.name(names[0])])])


def _layers(writer: Writer, group: str, op: Op) -> Expr:
    """What depth `number` reads of a group: the same arrays each time where they are shared."""
    start, span, times, order = (attribute(op, name) for name in ("start", "span", "times", "order"))
    assert isinstance(start, int) and isinstance(span, int) and isinstance(times, int) and isinstance(order, tuple)
    whole = code(item("params", group))
    if order and writer.plan.length(group) != len(order):
        return _shared(whole, order, start, span, times)
    first = f"{start} + {span} * number" if start else f"{span} * number"
    last = f"{start + span} + {span} * number"
    return expr(f"{whole}[{first} : {last}]")


def _shared(whole: str, order: tuple[Attr, ...], start: int, span: int, times: int) -> Expr:
    runs = [order[start + i * span : start + (i + 1) * span] for i in range(times)]
    if any(run != runs[0] for run in runs):
        raise EffcError(f"emit: depths of a recursion take the arrays {runs}, want the same for each")
    return expr(f"[{whole}[i] for i in {code(literal(runs[0]))}]")
