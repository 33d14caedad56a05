"""Rewriting immutable functions: substitute, replace, prune, inline, unroll, and a small matcher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from effc.errors import EffcError, nearest
from effc.ir.core import Attr, Func, Module, Op, Param, Ref, Value
from effc.ir.ops import array_index, attribute


class Names:
    """A supply of names not yet taken: `q`, then `q.1`, `q.2` ..."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = set(taken)
        self._next: dict[str, int] = {}

    def fresh(self, name: str) -> str:
        """`name`, or the first `name.N` that is free; taken from then on."""
        found, number = name, self._next.get(name, 0)
        while found in self.taken:
            number += 1
            found = f"{name}.{number}"
        self._next[name] = number
        self.taken.add(found)
        return found


def names_of(func: Func) -> Names:
    """A supply that knows every value of the function."""
    return Names(func.types())


def producers(func: Func) -> dict[str, Op]:
    """The op that defines each value; inputs have none."""
    return {value.name: op for op in func.ops for value in op.outputs}


def users(func: Func) -> dict[str, list[Op]]:
    """The ops that read each value, once each; results are read by `func.results`."""
    out: dict[str, list[Op]] = {name: [] for name in func.types()}
    for op in func.ops:
        for name in dict.fromkeys(op.inputs):
            out.setdefault(name, []).append(op)
    return out


def substitute(func: Func, new: Mapping[str, str]) -> Func:
    """Every use of a value replaced by another's, chains of replacements followed."""
    if not new:
        return func
    ops = tuple(replace(op, inputs=_followed(op.inputs, new)) for op in func.ops)
    return replace(func, ops=ops, results=_followed(func.results, new))


def rename(func: Func, new: Mapping[str, str]) -> Func:
    """Values called otherwise, where they are defined and where they are used."""
    return replace(
        func,
        inputs=_renamed(func.inputs, new),
        ops=tuple(_renamed_op(op, new) for op in func.ops),
        results=tuple(new.get(name, name) for name in func.results),
    )


def replace_ops(func: Func, fn: Callable[[Op], Sequence[Op] | None]) -> Func:
    """Each op replaced by what `fn` returns for it; None keeps it."""
    ops: list[Op] = []
    for op in func.ops:
        made = fn(op)
        ops.extend([op] if made is None else made)
    return replace(func, ops=tuple(ops))


def prune(func: Func) -> Func:
    """Without the ops whose outputs nobody reads."""
    live, kept = set(func.results), list[Op]()
    for op in reversed(func.ops):
        if not op.outputs or any(value.name in live for value in op.outputs):
            kept.append(op)
            live.update(op.inputs)
    return replace(func, ops=tuple(reversed(kept)))


def topological(func: Func) -> bool:
    """Whether every op stands after what it reads."""
    known = {value.name for value in func.inputs}
    for op in func.ops:
        if not known.issuperset(op.inputs):
            return False
        known.update(value.name for value in op.outputs)
    return known.issuperset(func.results)


def match_op(by: Mapping[str, Op], value: str, kind: str, **attrs: Attr | Ref) -> Op | None:
    """The op of `kind` that defines `value`, if its attributes (or the table's defaults) are these."""
    op = by.get(value)
    if op is None or op.kind != kind:
        return None
    return op if all(attribute(op, name) == wanted for name, wanted in attrs.items()) else None


def match_chain(by: Mapping[str, Op], value: str, *kinds: str) -> list[Op] | None:
    """Ops from the one that defines `value` upwards through first operands, of these kinds."""
    found: list[Op] = []
    for kind in kinds:
        op = match_op(by, value, kind)
        if op is None:
            return None
        found.append(op)
        value = op.inputs[0] if op.inputs else ""
    return found


def inline(caller: Func, call: Op, callee: Func) -> Func:
    """`call` replaced by the ops of `callee`, whose inputs are the call's operands."""
    names = names_of(caller)
    body, results = copy_ops(callee, call.inputs, names)
    out = replace_ops(caller, lambda op: body if op is call else None)
    return substitute(out, {v.name: r for v, r in zip(call.outputs, results, strict=True)})


def copy_ops(callee: Func, operands: Sequence[str], names: Names) -> tuple[list[Op], tuple[str, ...]]:
    """Ops of `callee` on these operands under fresh names, and what its results are called."""
    new = {value.name: operand for value, operand in zip(callee.inputs, operands, strict=True)}
    new |= {value.name: names.fresh(value.name) for op in callee.ops for value in op.outputs}
    ops = [_renamed_op(op, new) for op in callee.ops]
    return ops, tuple(new[name] for name in callee.results)


def inline_calls(module: Module, func: Func) -> Func:
    """The function with every `call` replaced by what it runs."""
    while call := next((op for op in func.ops if op.kind == "call"), None):
        target = call.attrs["func"]
        assert isinstance(target, Ref)
        func = inline(func, call, module.funcs[target.name])
    return func


def unroll(module: Module, func: str) -> Module:
    """The repeats of a function written out: layer i of `@layers.q` becomes the parameter `@layers.q.i`.

    Blocks and stacked parameters that nothing uses any more are dropped.
    """
    if func not in module.funcs:
        raise EffcError(f"unroll: no function is called @{func}{nearest(func, module.funcs)}")
    work, made = module.funcs[func], dict[str, Param]()
    while call := next((op for op in work.ops if op.kind == "repeat"), None):
        work = _unrolled(module, work, call, made)
    params = {**module.params, **made}
    return _without_unused(replace(module.with_func(work), params=params), module)


def _unrolled(module: Module, caller: Func, call: Op, made: dict[str, Param]) -> Func:
    target, times, carry = call.attrs["block"], call.attrs["times"], attribute(call, "carry")
    start = attribute(call, "start")
    assert isinstance(target, Ref) and isinstance(times, int) and isinstance(carry, int) and isinstance(start, int)
    names, ops = names_of(caller), list[Op]()
    fed, same = call.inputs[:carry], call.inputs[carry:]
    for layer in range(start, start + times):
        body, fed = copy_ops(module.funcs[target.name], (*fed, *same), names)
        ops.extend(_layer_op(module, op, layer, attribute(call, "order"), made) for op in body)
    out = replace_ops(caller, lambda op: ops if op is call else None)
    return substitute(out, {v.name: r for v, r in zip(call.outputs, fed, strict=True)})


def _layer_op(module: Module, op: Op, layer: int, order: Attr | Ref, made: dict[str, Param]) -> Op:
    """`op` of layer number `layer`, reading that layer's parameters, in its regions too."""
    stacks = {name: module.params[name].stack for name in op.params.values()}
    params = {
        role: _layer_param(module.params[name], array_index(order, stacks[name], layer), made)
        for role, name in op.params.items()
    }
    regions = {
        role: replace(region, ops=tuple(_layer_op(module, inner, layer, order, made) for inner in region.ops))
        for role, region in op.regions.items()
    }
    return replace(op, params=params, regions=regions)


def _layer_param(param: Param, layer: int, made: dict[str, Param]) -> str:
    if not param.stack:
        return param.name
    name = f"{param.name}.{layer}"
    number = range(*(param.over or (0, param.stack, 1)))[layer]
    path = param.path.replace("*", str(number)) if "*" in param.path else f"{param.path}[{layer}]"
    made[name] = replace(param, name=name, stack=0, path=path if param.path else "", over=None)
    return name


def _without_unused(module: Module, before: Module) -> Module:
    """Without the blocks no op runs, and the parameters that only those read."""
    used, todo = set[str](), [func for func in module.funcs.values() if not func.block]
    while todo:
        for name in _named(todo.pop()):
            if name not in used:
                used.add(name)
                todo += [module.funcs[name]] if name in module.funcs else []
    funcs = {name: f for name, f in module.funcs.items() if not f.block or name in used}
    idle = {name for name, p in before.params.items() if p.stack and name not in used}
    params = {name: p for name, p in module.params.items() if name not in idle}
    return replace(module, funcs=funcs, params=params)


def _named(func: Func) -> Iterator[str]:
    """Parameters and functions that a function names."""
    for op in func.ops:
        yield from op.params.values()
        yield from (value.name for value in op.attrs.values() if isinstance(value, Ref))
        for region in op.regions.values():
            yield from _named(region)


def _followed(names: Sequence[str], new: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(_end(name, new) for name in names)


def _end(name: str, new: Mapping[str, str]) -> str:
    """Where a chain of replacements ends; ValueError where it goes in a circle."""
    for _ in range(len(new) + 1):
        if new.get(name, name) == name:
            return name
        name = new[name]
    raise ValueError(f"%{name} is replaced by itself through others")


def _renamed(values: Sequence[Value], new: Mapping[str, str]) -> tuple[Value, ...]:
    return tuple(replace(value, name=new.get(value.name, value.name)) for value in values)


def _renamed_op(op: Op, new: Mapping[str, str]) -> Op:
    inputs = tuple(new.get(name, name) for name in op.inputs)
    return replace(op, inputs=inputs, outputs=_renamed(op.outputs, new))


__all__ = [
    "Names", "copy_ops", "inline", "inline_calls", "match_chain", "match_op", "names_of", "producers", "prune",
    "rename", "replace_ops", "substitute", "topological", "unroll", "users",
]  # fmt: skip
