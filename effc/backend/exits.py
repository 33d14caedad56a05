"""`early` as Python: what runs a layer, what keeps its keys, what leaves and what shows, handed to the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import libcst as cst

from effc.backend import heads, syntax
from effc.backend.plan import Block, Plan, by_call
from effc.backend.syntax import Expr, Names, Statement, call, expr, literal
from effc.ir.core import Attr, Func, Op, Ref
from effc.ir.ops import attribute
from effc.ir.types import Type


class Writer(Protocol):
    """The function being written."""

    plan: Plan
    names: Names
    types: dict[str, Type]

    def value(self, name: str) -> Expr: ...
    def param(self, name: str) -> Expr: ...
    def layers(self, group: str, start: int, times: int, order: tuple[Attr, ...]) -> Expr: ...


def keywords(func: Func) -> list[str]:
    """Further parameters of a function that tokens leave early: what decoding may say otherwise each time."""
    found = [op for op in func.ops if op.kind == "early"]
    return [f"threshold={attribute(found[0], 'threshold')!r}", "progress=None", "likeliest=False"] if found else []


def early(writer: Writer, op: Op) -> list[Statement]:
    """A local function for each block, one more where the head ends in one product, and the call."""
    writer.plan.used.add("early")
    blocks = {role: _target(writer, op, role) for role in _TITLES if role in op.attrs}
    order = attribute(op, "order")
    assert isinstance(order, tuple)
    deferred = op.attrs.get("state") == "deferred"
    rest = [syntax.code(writer.value(name)) for name in op.inputs[1:]]
    moving = [writer.value(name) for name in op.inputs[1:] if deferred and by_call(writer.types[name])]
    at_exit = [writer.names.fresh("at_exit")]
    given = {"block": [syntax.code(value) for value in moving], "after": at_exit}
    x = writer.value(op.inputs[0])
    titles = {role: writer.names.fresh(_TITLES[role]) for role in blocks}
    state, layers = writer.names.fresh("state"), blocks["block"].layer_names()
    functions = [
        _function(
            titles[role],
            role,
            blocks[role],
            state,
            [*(at_exit if role == "after" else []), *rest] if role in _RUN else [],
            layers if role in _RUN else {},
            given.get(role, []),
        )
        for role in blocks
    ]
    times, exits = attribute(op, "times"), attribute(op, "exits")
    assert isinstance(times, int) and isinstance(exits, tuple)
    arrays = [_arrays(writer, blocks["block"], times, order), _arrays(writer, blocks["exit"], len(exits), ())]
    bests = {**_best(writer, op, "head", state), **_best(writer, op, "say", state)}
    functions += bests.values()
    more = {role: syntax.name(titles.pop(role)) for role in ("after", "say") if role in titles}
    more |= {key: syntax.name(function.name.value) for key, function in bests.items()}
    stack = call("Stack", [*arrays, *map(syntax.name, titles.values())], more)
    told = {"at": literal(exits), **{name: expr(name) for name in ("threshold", "progress", "likeliest")}}
    told |= {n: literal(op.attrs[n]) for n in ("measure", "rows", "decay", "tau") if n in op.attrs}
    if deferred:
        told |= {"waiting": literal(attribute(op, "waiting")), "rest": syntax.sequence(moving)}
    outputs = [writer.names.new(value.name) for value in op.outputs]
    name = writer.names.fresh("stack")
    run = call("early", [syntax.name("step"), x, syntax.name(name)], told)
    return [*functions, syntax.assign([name], stack), syntax.assign(outputs, run)]


_TITLES = {"block": "run", "keys": "keep", "exit": "leave", "head": "show", "after": "after", "say": "say"}
_RUN = ("block", "keys", "after")


def _target(writer: Writer, op: Op, role: str) -> Block:
    target = op.attrs[role]
    assert isinstance(target, Ref)
    return writer.plan.blocks[target.name]


def _best(writer: Writer, op: Op, role: str, state: str) -> dict[str, cst.FunctionDef]:
    """`def best(state):` the likeliest tokens of the head (of the exits', `tell`), where it ends in one product."""
    target = op.attrs.get(role)
    if not isinstance(target, Ref):
        return {}
    head = writer.plan.module.funcs[target.name]
    if (found := heads.product(writer.plan.module, head)) is None:
        return {}
    tokens = heads.likeliest(writer.plan, head, state, writer.param(found.linear.params["w"]))
    key = {"head": "best", "say": "tell"}[role]
    return {key: syntax.function(writer.names.fresh(key), [state], [syntax.give([tokens])])}


def _function(
    title: str, role: str, block: Block, state: str, rest: Sequence[str], layers: Mapping[str, str],
    moving: Sequence[str],
) -> Statement:  # fmt: skip
    """`def run(p, x, step): return layer(p, x, cos, sin, step)`; `moving` of the rest are given with each call."""
    before, after = block.arguments()
    own = {"exit": ["p", state], "head": [state], "say": [state]}.get(role, ["p", state, "step", *moving])
    body = syntax.statements(f"{', '.join(layers.values())} = p") if len(layers) > 1 else []
    if layers:  # what keeps keys may read fewer groups than a layer does: both are called as the layer calls them
        before = [*(layers[group] for group in block.groups), *["params"] * block.shared]
    body.append(syntax.give([call(block.title, [expr(a) for a in [*before, state, *rest, *after]])]))
    return syntax.function(title, own, body)


def _arrays(writer: Writer, block: Block, count: int, order: tuple[Attr, ...]) -> Expr:
    """What a layer reads, one entry a layer; zipped where there are several groups."""
    over = [writer.layers(group, 0, count, order) for group in block.groups] or [expr(f"range({count})")]
    return over[0] if len(over) == 1 else call("list", [call("zip", over)])
