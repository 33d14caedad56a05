"""q, k and v = one linear and a split: fewer, larger products for the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from effc.ir.core import Func, Module, Op, Param, Value, param_uses
from effc.ir.types import Quant, Size, Type
from effc.passes.base import Notes
from effc.runtime.forms import pack, unpack
from effc.weights import Array, Arrays, Lazy


@dataclass(frozen=True)
class Join:
    """Linears of one function that read one value, and what they become."""

    func: str
    ops: tuple[Op, ...]
    w: Param
    bias: Param | None

    @property
    def axis(self) -> int:
        """The axis of the outputs in w."""
        return -1 if self.ops[0].attrs.get("layout", "kn") == "kn" else -2


def run(module: Module, notes: Notes) -> Module:
    """The module with every joinable group joined, and the parameters it replaced gone."""
    joins = plan(module, notes)
    for join in joins:
        module = module.with_func(_joined(module.funcs[join.func], join))
        module = module.with_params(join.w, *([join.bias] if join.bias else []))
        notes.chose(f"{join.w.name}: {len(join.ops)} linears that read %{join.ops[0].inputs[0]} of @{join.func}")
    gone = {name for join in joins for op in join.ops for name in op.params.values()}
    return replace(module, params={n: p for n, p in module.params.items() if n not in gone})


def plan(module: Module, notes: Notes) -> list[Join]:
    """Every group of two or more linears that can be joined; near misses go to `notes`."""
    uses = param_uses(module)
    shared = {name for name, readers in uses.items() if len(readers) > 1}
    joins: list[Join] = []
    for func in module.funcs.values():
        for ops in _same_input(func):
            for group in _alike(module, [op for op in ops if _own(op, shared, notes)], notes):
                joins.append(_join(module, func, group))
    return joins


def _same_input(func: Func) -> Iterator[list[Op]]:
    """Linears by the value they read, where there are several."""
    groups: dict[str, list[Op]] = {}
    for op in func.ops:
        if op.kind == "linear":
            groups.setdefault(op.inputs[0], []).append(op)
    yield from (group for group in groups.values() if len(group) > 1)


def _own(op: Op, shared: set[str], notes: Notes) -> bool:
    """Whether no other op reads its parameters."""
    taken = [name for name in op.params.values() if name in shared]
    for name in taken:
        notes.skip(name, "read by other ops too, so it stays by itself")
    return not taken


def _alike(module: Module, ops: Sequence[Op], notes: Notes) -> Iterator[list[Op]]:
    """Cut into groups of one layout, coding and number of layers."""
    groups: dict[str, list[Op]] = {}
    for op in ops:
        groups.setdefault(_likeness(module, op), []).append(op)
    for group in groups.values():
        if len(group) > 1:
            yield group
        elif len(groups) > 1:
            notes.skip(
                group[0].params["w"],
                f"reads what others read, but is {_likeness(module, group[0])} and they are not",
            )


def _likeness(module: Module, op: Op) -> str:
    w = module.params[op.params["w"]]
    parts = [str(w.type.dtype), str(op.attrs.get("layout", "kn")), str(op.out.type.dtype)]
    return " ".join([*parts, f"of {w.stack} layers"] if w.stack else parts)


def _join(module: Module, func: Func, ops: list[Op]) -> Join:
    ws = [module.params[op.params["w"]] for op in ops]
    name = _name([w.name for w in ws], module)
    layout = str(ops[0].attrs.get("layout", "kn"))
    w = _made(name, ws, _wide([w.type for w in ws], -1 if layout == "kn" else -2))
    if not any("bias" in op.params for op in ops):
        return Join(func.name, tuple(ops), w, None)
    biases = [module.params[op.params["bias"]] for op in ops if "bias" in op.params]
    width = w.type.shape[-1 if layout == "kn" else -2]
    bias = replace(_made(_bias_name(name), biases, Type(biases[0].type.dtype, (width,))), stack=w.stack)
    return Join(func.name, tuple(ops), w, bias)


def _bias_name(w: str) -> str:
    """`layers.attn.q_k_v.bias` beside `layers.attn.q_k_v.kernel`."""
    head, dot, last = w.rpartition(".")
    return f"{head}.bias" if dot and last in ("kernel", "w", "weight") else f"{w}.bias"


def _made(name: str, parts: Sequence[Param], type_: Type) -> Param:
    return Param(name, type_, parts[0].stack, " + ".join(part.name for part in parts))


def _wide(types: Sequence[Type], axis: int) -> Type:
    shape = list(types[0].shape)
    total: Size = 0
    for type_ in types:
        total = type_.shape[axis] + total
    shape[axis] = total
    return Type(types[0].dtype, tuple(shape))


def _name(names: list[str], module: Module) -> str:
    """`layers.attn.q_k_v.kernel` from `layers.attn.q.kernel`, ...: what is the same is said once."""
    words = [name.split(".") for name in names]
    head = _same(words)
    tail = _same([w[head:][::-1] for w in words])
    middle = "_".join("_".join(w[head : len(w) - tail]) for w in words)
    name = ".".join([*words[0][:head], middle, *words[0][len(words[0]) - tail :]])
    while name in module.params:
        name += "_"
    return name


def _same(words: list[list[str]]) -> int:
    """How many words are the same at the start of all, each keeping one of its own."""
    count = 0
    while count < min(map(len, words)) - 1 and len({w[count] for w in words}) == 1:
        count += 1
    return count


def _joined(func: Func, join: Join) -> Func:
    """Before: one linear each. After: one linear and a split, where the first stood."""
    outs = [op.out for op in join.ops]
    taken = func.types()
    wide = "_".join(out.name for out in outs)
    while wide in taken:
        wide += "_"
    value = Value(wide, _wide([out.type for out in outs], -1))
    params = {"w": join.w.name} | ({"bias": join.bias.name} if join.bias else {})
    first = join.ops[0]
    linear = replace(first, outputs=(value,), params=params)
    sizes = tuple(out.type.shape[-1] for out in outs)
    split = Op("split", (wide,), tuple(outs), {}, {"sizes": sizes}, {}, first.loc)
    kept = [op for op in func.ops if not any(op is other for other in join.ops[1:])]
    place = next(i for i, op in enumerate(kept) if op is first)
    return replace(func, ops=(*kept[:place], linear, split, *kept[place + 1 :]))


# ---- arrays


def made(module: Module, store: Mapping[str, Lazy]) -> list[Lazy]:
    """Arrays of every joined parameter, read through the parts."""
    out: list[Lazy] = []
    for join in plan(module, Notes()):
        out.append(Lazy(join.w, _matrix(join, module, store)))
        if join.bias:
            out.append(Lazy(join.bias, _vector(join, module, store)))
    return out


def _matrix(join: Join, module: Module, store: Mapping[str, Lazy]) -> Callable[[int], Arrays]:
    params = [module.params[op.params["w"]] for op in join.ops]

    def read(layer: int) -> Arrays:
        pieces = [store[param.name].read(layer) for param in params]
        return {suffix: _cat(suffix, [p[suffix] for p in pieces], params, join.axis) for suffix in pieces[0]}

    return read


def _cat(suffix: str, arrays: list[Array], params: Sequence[Param], axis: int) -> Array:
    """Packed codes whose rows do not end with a byte are unpacked first."""
    quant = params[0].type.dtype
    widths = [param.type.shape[-1] for param in params]
    bits = quant.bits if suffix == "codes" and isinstance(quant, Quant) else 8
    if axis != -1 or not any(isinstance(w, int) and w * bits % 8 for w in widths[:-1]):
        return np.concatenate(arrays, axis)
    codes = [unpack(a, int(str(w)), bits) for a, w in zip(arrays, widths, strict=True)]
    return pack(np.concatenate(codes, axis), bits)


def _vector(join: Join, module: Module, store: Mapping[str, Lazy]) -> Callable[[int], Arrays]:
    """Biases end to end, zeros for a linear that has none."""

    def piece(op: Op, layer: int) -> Array:
        if "bias" in op.params:
            lazy = store[op.params["bias"]]
            return lazy.read(layer if lazy.param.stack else 0)[""]
        width = module.params[op.params["w"]].type.shape[join.axis]
        return np.zeros(int(str(width)), np.float32)

    def read(layer: int) -> Arrays:
        pieces = [piece(op, layer) for op in join.ops]
        dtype = next(p.dtype for p, op in zip(pieces, join.ops, strict=True) if "bias" in op.params)
        return {"": np.concatenate([p.astype(dtype) for p in pieces])}

    return read
