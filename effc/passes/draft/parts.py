"""What drafters are built from: a model cut at its last layer loop, functions copied under new names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from effc.ir.core import Func, Module, Op, Param, Ref, Value, walk
from effc.ir.ops import ELEMENTWISE
from effc.ir.types import Type
from effc.passes.base import PassError
from effc.weights import Lazy

PREFIX = "draft"
"""Name of the drafter's function, and what the names of its blocks and parameters begin with."""


@dataclass(frozen=True)
class Cut:
    """A forward function: what the layers read, their loop, what makes logits of what it leaves, the matrix there."""

    func: Func
    before: tuple[Op, ...]
    loop: Op
    after: tuple[Op, ...]
    head: Op

    @property
    def hidden(self) -> Value:
        """What the layers leave, [b,t,d]."""
        return self.loop.out

    @property
    def width(self) -> int:
        """d."""
        size = self.hidden.type.shape[-1]
        assert isinstance(size, int)
        return size

    @property
    def vocab(self) -> int:
        """Tokens that logits are of."""
        size = self.func.result_types()[0].shape[-1]
        assert isinstance(size, int)
        return size


def cut(name: str, module: Module) -> Cut:
    """PassError where the model is no loop over layers between an embedding and a head."""
    func = module.forward()
    at = max((i for i, op in enumerate(func.ops) if op.kind == "repeat"), default=-1)
    if at < 0:
        raise PassError(f"{name}: @{func.name} has no `repeat`, want layers in a loop to draft from")
    loop = func.ops[at]
    if len(loop.outputs) != 1 or len(loop.out.type.shape) != 3 or len(func.results) != 1:
        raise PassError(f"{name}: the layers give {_types(loop.outputs)}, want one value [b,t,d] for the logits")
    after = _between(func, at, loop.out.name)
    read = {name for op in after for name in op.inputs} - {v.name for op in after for v in op.outputs}
    constants = [op for op in func.ops if not op.inputs and op.out.name in read]
    if read - {loop.out.name, *(op.out.name for op in constants)}:
        other = sorted(read - {loop.out.name})[0]
        raise PassError(f"{name}: the logits also read %{other}, want them made of what the layers leave alone")
    head = next((op for op in reversed(after) if op.kind == "linear"), None)
    wide = after[after.index(head) + 1 :] if head else ()
    if head is None or any(op.kind not in ELEMENTWISE | {"softcap"} for op in wide):
        raise PassError(f"{name}: the logits are not a linear's, want a head to draft with")
    return Cut(func, needed(func, loop.inputs), loop, (*constants, *after), head)


def needed(func: Func, values: Iterable[str]) -> tuple[Op, ...]:
    """The ops that make these values, in order."""
    wanted, kept = set(values), list[Op]()
    for op in reversed(func.ops):
        if wanted & {value.name for value in op.outputs}:
            wanted |= {*op.inputs, *(name for region in op.regions.values() for o in walk(region) for name in o.inputs)}
            kept.append(op)
    return tuple(reversed(kept))


def _between(func: Func, at: int, start: str) -> tuple[Op, ...]:
    """Ops after the loop that depend on it."""
    known, out = {start}, list[Op]()
    for op in func.ops[at + 1 :]:
        if known & set(op.inputs):
            known |= {value.name for value in op.outputs}
            out.append(op)
    return tuple(out)


def with_params(ops: Sequence[Op], new: Mapping[str, str]) -> tuple[Op, ...]:
    """Ops that read other parameters, inside regions too."""

    def changed(op: Op) -> Op:
        regions = {role: replace(f, ops=with_params(f.ops, new)) for role, f in op.regions.items()}
        return replace(op, params={r: new.get(n, n) for r, n in op.params.items()}, regions=regions)

    return tuple(map(changed, ops))


def narrowed(ops: Sequence[Op], head: Op, size: int) -> tuple[Op, ...]:
    """The head and what follows it, for logits of `size` tokens; ops before it as they are."""
    at = list(ops).index(head)

    def narrow(value: Value) -> Value:
        return Value(value.name, Type(value.type.dtype, (*value.type.shape[:-1], size)))

    wide = {value.name for op in ops[at:] for value in op.outputs}
    return tuple(replace(op, outputs=tuple(narrow(v) if v.name in wide else v for v in op.outputs)) for op in ops)


def renamed(module: Module, prefix: str = PREFIX) -> tuple[dict[str, Param], dict[str, Func]]:
    """Parameters and functions of another model, to stand beside those of this one; its forward is @draft."""
    forward = module.forward().name
    funcs = {name: prefix if name == forward else f"{prefix}.{name}" for name in module.funcs}
    params = {name: f"{prefix}.{name}" for name in module.params}
    both = {**params, **funcs}

    def op(op: Op) -> Op:
        attrs = {k: Ref(both[v.name]) if isinstance(v, Ref) else v for k, v in op.attrs.items()}
        regions = {role: func(f) for role, f in op.regions.items()}
        return replace(op, params={r: params[n] for r, n in op.params.items()}, attrs=attrs, regions=regions)

    def func(f: Func) -> Func:
        return replace(f, ops=tuple(map(op, f.ops)))

    return (
        {params[n]: replace(p, name=params[n]) for n, p in module.params.items()},
        {funcs[n]: replace(func(f), name=funcs[n]) for n, f in module.funcs.items()},
    )


def lazily(param: Param, lazy: Lazy) -> Lazy:
    """The same arrays under another name."""
    return Lazy(param, lazy.read)


def layer_of(param: Param, lazy: Lazy, layer: int) -> Lazy:
    """One array of a stack, as a parameter of its own."""
    return Lazy(param, lambda _: lazy.read(layer))


def made(param: Param, make: Callable[[], Mapping[str, object]]) -> Lazy:
    """Arrays made when they are read."""
    return Lazy(param, lambda _: make())  # type: ignore[arg-type]


def _types(values: Iterable[Value]) -> str:
    return ", ".join(str(value.type) for value in values)
