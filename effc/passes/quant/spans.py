"""Cutting a stack of layers into spans, so that their weights can be coded differently.

%y = repeat(%x) {block=@layer, times=12}                       # @layers.q: 12 * f32[..]
->
%x1 = repeat(%x) {block=@layer_0, times=1}                     # @layers_0.q: 1 * f32[..]
%y = repeat(%x1) {block=@layer_1, times=11}                    # @layers_1.q: 11 * f32[..]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from effc.errors import nearest
from effc.ir.core import Func, Module, Op, Param, Ref, Value, walk
from effc.ir.ops import attribute
from effc.ir.rewrite import names_of, replace_ops
from effc.ir.stream import params_of
from effc.passes.base import PassError
from effc.weights import Arrays, Lazy, Store

Came = Mapping[str, tuple[str, int]]
"""For each new parameter the old one, and the number of its first array there."""


@dataclass(frozen=True)
class Cut:
    """The module after, and where its new parameters are from."""

    module: Module
    came: Came

    def store(self, before: Store) -> Store:
        """The arrays of the old parameters, under the new names."""
        made = [Lazy(self.module.params[new], _shifted(before[old], first)) for new, (old, first) in self.came.items()]
        return before.replace(made, self.module)


def _shifted(lazy: Lazy, first: int) -> Callable[[int], Arrays]:
    def read(layer: int) -> Arrays:
        return lazy.read(first + layer)

    return read


def parse_cuts(where: str, text: str) -> dict[str, tuple[int, ...]]:
    """`layer:1+11` -> the layers at which spans of @layer begin; several blocks with a `;` between."""
    out: dict[str, tuple[int, ...]] = {}
    for item in filter(None, text.split(";")):
        block, _, points = item.rpartition(":")
        if not block or not all(point.isdecimal() for point in points.split("+")):
            raise PassError(f"{where}: '{item}' tells no layers, want the like of layer:1+11")
        out[block] = tuple(sorted({int(point) for point in points.split("+")}))
    return out


def spell_cuts(cuts: Mapping[str, Sequence[int]]) -> str:
    """As `parse_cuts` reads it."""
    return ";".join(f"{block}:{'+'.join(map(str, points))}" for block, points in cuts.items() if points)


def loops(module: Module) -> dict[str, tuple[Func, Op]]:
    """Blocks that can be cut: run by one plain `repeat` over their whole stack, and named by nothing else."""
    found: dict[str, list[tuple[Func, Op]]] = {}
    for func in module.funcs.values():
        for op in walk(func):
            for value in op.attrs.values():
                if isinstance(value, Ref) and value.name in module.funcs:
                    found.setdefault(value.name, []).append((func, op))
    return {name: runs[0] for name, runs in found.items() if len(runs) == 1 and _plain(module, name, *runs[0])}


def _plain(module: Module, block: str, func: Func, op: Op) -> bool:
    """Nested loops and shared arrays stay whole; a parameter of the stack is read by nothing else."""
    stacks = {module.params[name].stack for name in stacked(module, block)}
    outside = [other for other in module.funcs.values() if other.name != block]
    elsewhere = {name for other in outside for name in params_of(other.ops)}
    return (
        op in func.ops and op.kind == "repeat" and not func.block
        and not any(isinstance(value, Ref) for inner in walk(module.funcs[block]) for value in inner.attrs.values())
        and (attribute(op, "start"), attribute(op, "order")) == (0, ()) and stacks == {attribute(op, "times")}
        and not elsewhere & set(stacked(module, block))
    )  # fmt: skip


def stacked(module: Module, block: str) -> list[str]:
    """Parameters that hold one array a layer of the block."""
    return [name for name in params_of(module.funcs[block].ops) if module.params[name].stack]


def cut(where: str, module: Module, cuts: Mapping[str, Sequence[int]]) -> Cut:
    """The module with blocks in spans; PassError for a block or layer that is not there."""
    came: dict[str, tuple[str, int]] = {}
    for block, points in cuts.items():
        known = loops(module)
        if block not in known:
            raise PassError(f"{where}: no block '{block}' that can be cut, want {', '.join(known) or 'none'}"
                            f"{nearest(block, known)}")  # fmt: skip
        module, new = _cut(where, module, block, *known[block], points)
        came |= new
    return Cut(module, came)


def _cut(
    where: str, module: Module, block: str, func: Func, op: Op, points: Sequence[int]
) -> tuple[Module, dict[str, tuple[str, int]]]:
    times = attribute(op, "times")
    assert isinstance(times, int)
    if not all(0 < point < times for point in points):
        raise PassError(f"{where}: {spell_cuts({block: points})}, want layers from 1 to {times - 1}")
    spans = list(zip([0, *points], [*points, times], strict=True))
    names, came, ops = stacked(module, block), dict[str, tuple[str, int]](), list[Op]()
    params = {name: param for name, param in module.params.items() if name not in names}
    funcs = {name: one for name, one in module.funcs.items() if name != block}
    fed, fresh, carry = op.inputs, names_of(func), len(op.outputs)
    for number, (start, stop) in enumerate(spans):
        new = {name: _named(name, number) for name in names}
        params |= {new[name]: _part(module.params[name], new[name], start, stop) for name in names}
        came |= {new[name]: (name, start) for name in names}
        piece = f"{block}_{number}"
        funcs[piece] = replace(_reading(module.funcs[block], new), name=piece)
        last = stop == times
        outputs = op.outputs if last else tuple(Value(fresh.fresh(v.name), v.type) for v in op.outputs)
        ops.append(
            replace(op, inputs=fed, outputs=outputs, attrs={**op.attrs, "block": Ref(piece), "times": stop - start})
        )
        fed = (*(value.name for value in outputs), *op.inputs[carry:])
    funcs[func.name] = replace_ops(func, lambda one: ops if one is op else None)
    return replace(module, params=params, funcs=_blocks_first(funcs)), came


def _blocks_first(funcs: Mapping[str, Func]) -> dict[str, Func]:
    return dict(sorted(funcs.items(), key=lambda item: not item[1].block))


def _named(name: str, number: int) -> str:
    """`layers.attn.q` -> `layers_0.attn.q`."""
    group, dot, rest = name.partition(".")
    return f"{group}_{number}{dot}{rest}"


def _part(param: Param, name: str, start: int, stop: int) -> Param:
    first, _, step = param.over or (0, param.stack, 1)
    return replace(param, name=name, stack=stop - start, over=(first + start * step, first + stop * step, step))


def _reading(func: Func, new: Mapping[str, str]) -> Func:
    return replace(func, ops=tuple(_op_reading(op, new) for op in func.ops))


def _op_reading(op: Op, new: Mapping[str, str]) -> Op:
    params = {role: new.get(name, name) for role, name in op.params.items()}
    return replace(op, params=params, regions={role: _reading(region, new) for role, region in op.regions.items()})


def outstanding(shares: Sequence[float]) -> tuple[int, ...]:
    """Where to cut so that layers that hurt twice as much as the mean, or more, stand apart: six cuts at most."""
    for factor in (2.0, 3.0, 4.0, 6.0):
        apart = [share > factor * sum(shares) / len(shares) for share in shares]
        points = tuple(i for i in range(1, len(apart)) if apart[i] != apart[i - 1])
        if len(points) <= 6:
            return points
    return ()


def spans_of(points: Sequence[int], times: int) -> Iterator[range]:
    """Layers of each span."""
    for start, stop in zip([0, *points], [*points, times], strict=True):
        yield range(start, stop)
