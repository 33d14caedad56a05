"""Heads that end in one product: written in two, so that a program can have their likeliest tokens alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from effc.backend import syntax
from effc.backend.plan import Plan
from effc.backend.syntax import Expr, call, expr, literal
from effc.ir.core import Func, Module, Op, Ref, all_ops


@dataclass(frozen=True)
class Product:
    """at: which op of a head is the product, in f32 and without a bias; cap: of the softcap after it, 0 where none."""

    at: int
    linear: Op
    cap: float


def parted(module: Module) -> Module:
    """With each head of an `early` that ends in a product calling a function for what that is of."""
    roles = [op.attrs.get(role) for _, op in all_ops(module) if op.kind == "early" for role in ("head", "say")]
    for name in dict.fromkeys(role.name for role in roles if isinstance(role, Ref)):
        head = module.funcs.get(name)
        found = product(module, head) if head else None
        if head and found and found.at:
            module = module.with_func(inner := _before(module, head, found)).with_func(_after(head, inner, found))
    return module


def _before(module: Module, head: Func, found: Product) -> Func:
    title = f"{head.name}.states"
    while title in module.funcs:
        title += "_"
    return replace(head, name=title, ops=head.ops[: found.at], results=found.linear.inputs)


def _after(head: Func, inner: Func, found: Product) -> Func:
    state = next(value for op in inner.ops for value in op.outputs if (value.name,) == inner.results)
    whole = Op("call", tuple(value.name for value in head.inputs), (state,), attrs={"func": Ref(inner.name)})
    return replace(head, ops=(whole, *head.ops[found.at :]))


def product(module: Module, head: Func) -> Product | None:
    """What a head ends in; None where that is no product alone, or rounded to fewer bits than f32."""
    at, cap, ends = len(head.ops) - 1, 0.0, head.results
    if at > 0 and head.ops[at].kind == "softcap" and (head.ops[at].out.name,) == ends:
        cap, ends, at = float(str(head.ops[at].attrs["cap"])), head.ops[at].inputs, at - 1
    op = head.ops[at] if at >= 0 else None
    if op is None or op.kind != "linear" or (op.out.name,) != ends or "bias" in op.params:
        return None
    made = any(op.inputs == (value.name,) for before in head.ops[:at] for value in before.outputs)
    plain = str(op.out.type.dtype) == "f32" and not module.params[op.params["w"]].stack
    return Product(at, op, cap) if plain and (made or not at) else None


def likeliest(plan: Plan, head: Func, state: str, weight: Expr) -> Expr:
    """`top(head_states(params, state), params["embed"], layout="nk")`, for a head that is `parted`."""
    found = product(plan.module, head)
    assert found is not None
    plan.used.add("top")
    x: Expr = syntax.name(state)
    if found.at:
        target = head.ops[0].attrs["func"]
        assert isinstance(target, Ref)
        before, after = plan.blocks[target.name].arguments()
        x = call(plan.blocks[target.name].title, [*map(syntax.name, before), x, *map(syntax.name, after)])
    told = {name: literal(found.linear.attrs[name]) for name in ("layout",) if name in found.linear.attrs}
    return call("top", [x, weight], told | ({"softcap": expr(repr(found.cap))} if found.cap else {}))
