"""Routers in a folded stack: the span becomes one `recurse`, layers before and after it stay in a `repeat`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from effc.ir.core import Func, Module, Op, Param, Value, walk
from effc.ir.ops import attribute
from effc.ir.rewrite import names_of, replace_ops
from effc.ir.types import Type, evaluate
from effc.passes.base import Notes, PassError
from effc.passes.mor.sharing import Folding
from effc.weights import Lazy

ROUTER = "routers.w"

ORDERLY = frozenset({"positions", "window", "running", "recur", "repeat", "early", "recurse"})
"""Ops that tell where a token stands among all others: those that are gathered for a depth do not."""


@dataclass(frozen=True)
class Routes:
    """How tokens are routed, the share of them that the last depth takes (0: one in `recursions`), whose keys."""

    select: str
    last: float
    kv: str

    def capacity(self, recursions: int) -> tuple[float, ...]:
        """Of each depth, evenly spaced from all tokens to the last share; token-choice is not limited."""
        if self.select == "token":
            return (1.0,) * recursions
        last = self.last or 1 / recursions
        return tuple(1.0 - (1.0 - last) * depth / (recursions - 1) for depth in range(recursions))


def check(routes: Routes, folding: Folding, op: Op, block: Func) -> None:
    """PassError for what cannot be routed."""
    if not 0 <= routes.last <= 1:
        raise PassError(f"mor: capacity={routes.last:g}, want a share of the tokens, 0 to 1")
    if not folding.cycle:
        raise PassError("mor: a depth is one pass over shared layers, want share=cycle or middle-cycle with a router")
    if attribute(op, "carry") != 1:
        raise PassError(f"mor: @{block.name} carries {attribute(op, 'carry')} values, want one for tokens to be routed")
    for inner in walk(block):
        odd = (
            inner.kind in ORDERLY
            or bool(inner.regions)
            or bool(inner.kind == "attention" and inner.attrs.get("window"))
        )
        if odd:
            what = f"'{inner.kind}' that counts positions" if inner.kind == "attention" else f"'{inner.kind}'"
            raise PassError(f"mor: @{block.name} has {what}, want router=none: tokens that skip a depth leave gaps")


def router(routes: Routes, recursions: int, op: Op) -> Param:
    """A row a depth after the first (expert), or a row a number of runs (token)."""
    width = evaluate(op.outputs[0].type.shape[-1], {})
    rows = recursions if routes.select == "token" else recursions - 1
    return Param(ROUTER, Type("f32", (rows, width)), path="routers of mor, from zero")


def made(param: Param) -> Lazy:
    """Zeros: until routers have learned, no token stands out."""
    shape = tuple(evaluate(size, {}) for size in param.type.shape)
    return Lazy(param, lambda i: {"": np.zeros(shape, np.float32)})


def routed(module: Module, routes: Routes, folding: Folding, notes: Notes) -> Module:
    """The module with the folded repeat cut in three, the middle one routed."""
    func = module.forward()
    whole = next(op for op in func.ops if op.kind == "repeat" and op.attrs.get("order") == folding.order())
    param = router(routes, folding.recursions, whole)
    if ROUTER in module.params:
        raise PassError(f"mor: a parameter is called @{ROUTER} already, want no other routers")
    cut = list(_cut(func, whole, routes, folding))
    func = replace_ops(func, lambda op: cut if op is whole else None)
    shares = ", ".join(f"{share:g}" for share in routes.capacity(folding.recursions))
    notes.chose(f"{routes.select}-choice routers, shares of the tokens by depth {shares}, keys {routes.kv}")
    return replace(module.with_func(func)).with_params(param)


def _cut(func: Func, whole: Op, routes: Routes, folding: Folding) -> Iterator[Op]:
    names, x, out = names_of(func), whole.inputs[0], whole.out
    if folding.first:
        mid = Value(names.fresh(f"{out.name}.first"), out.type)
        yield _run(whole, x, mid, 0, folding.first)
        x = mid.name
    after = folding.layers - folding.last
    mid = Value(names.fresh(f"{out.name}.deep"), out.type) if after else out
    attrs = {
        "block": whole.attrs["block"], "times": folding.recursions, "span": folding.size,
        "capacity": routes.capacity(folding.recursions), "start": folding.first, "order": folding.order(),
        "select": routes.select, "kv": routes.kv,
    }  # fmt: skip
    yield Op("recurse", (x, *whole.inputs[1:]), (mid,), {"router": ROUTER}, attrs, {}, whole.loc)
    if after:
        yield _run(whole, mid.name, out, folding.last, after)


def _run(whole: Op, x: str, out: Value, start: int, times: int) -> Op:
    attrs = {**whole.attrs, "times": times} | ({"start": start} if start else {})
    return replace(whole, inputs=(x, *whole.inputs[1:]), outputs=(out,), attrs=attrs)
