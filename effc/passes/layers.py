"""A shallower model: some layers of the longest stack of equal ones, in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from effc.errors import EffcError
from effc.ir.core import Func, Module, Op, Param, Ref, all_ops
from effc.ir.ops import attribute
from effc.ir.rewrite import replace_ops
from effc.weights import Arrays, Lazy, Store


def stepwise(layers: int, keep: int) -> tuple[int, ...]:
    """`keep` of `layers` numbers, the first and the last among them, as evenly as they go."""
    if not 1 <= keep <= layers:
        raise EffcError(f"layers={keep}: want 1 to {layers}, which the model has")
    if keep == 1:
        return (0,)
    return tuple((2 * i * (layers - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep))


def stack_of(module: Module) -> tuple[Func, Op, int]:
    """The function, its longest plain `repeat` and how often that runs; EffcError where there is none."""
    forward = module.forward()
    found = [op for op in forward.ops if op.kind == "repeat" and not _cut(op)]
    if not found:
        raise EffcError(f"{module.name}: @{forward.name} repeats no layers, want a stack of equal ones to take some of")
    longest = max(found, key=_times)
    users = [op for _, op in all_ops(module) if longest.attrs["block"] in op.attrs.values()]
    if len(users) > 1:
        raise EffcError(f"{module.name}: {longest.attrs['block']} is run by {len(users)} ops, want one")
    return forward, longest, _times(longest)


def with_layers(module: Module, ids: Sequence[int]) -> Module:
    """The module with these layers of its stack and no other."""
    func, op, layers = stack_of(module)
    wrong = [i for i in ids if not 0 <= i < layers]
    if wrong or not ids or list(ids) != sorted(set(ids)):
        shown = ",".join(map(str, ids))
        raise EffcError(f"layers {shown}: want numbers of 0 to {layers - 1} in rising order, each once")
    shorter = replace(op, attrs={**op.attrs, "times": len(ids)})
    changed = module.with_func(replace_ops(func, lambda one: [shorter] if one is op else None))
    return changed.with_params(*(_shorter(p, ids) for p in _stacked(module, op)))


def layer_store(module: Module, ids: Sequence[int], store: Store) -> Store:
    """The arrays of `with_layers(module, ids)`, read through those of the whole model."""
    _, op, _ = stack_of(module)
    after = with_layers(module, ids)
    made = [Lazy(after.params[p.name], _picked(store[p.name], ids)) for p in _stacked(module, op)]
    return store.replace(made, after)


def _stacked(module: Module, op: Op) -> list[Param]:
    """Parameters with an array a layer, of the block and of blocks it runs."""
    target = op.attrs["block"]
    assert isinstance(target, Ref)
    names = dict.fromkeys(name for one in module.funcs[target.name].ops for name in one.params.values())
    return [module.params[name] for name in names if module.params[name].stack]


def _shorter(param: Param, ids: Sequence[int]) -> Param:
    path = f"layers {','.join(map(str, ids))} of {param.path or param.name}"
    return replace(param, stack=len(ids), path=path, over=None, perm=None)


def _picked(lazy: Lazy, ids: Sequence[int]) -> Callable[[int], Arrays]:
    def read(layer: int) -> Arrays:
        return lazy.read(ids[layer])

    return read


def _times(op: Op) -> int:
    times = op.attrs["times"]
    assert isinstance(times, int)
    return times


def _cut(op: Op) -> bool:
    """Whether it runs but a part of its stack, or in another order."""
    return bool(attribute(op, "start")) or bool(attribute(op, "order"))
