"""A stack of layers as fewer arrays: which parameters are shared, which each layer keeps, low-rank deltas.

Before: repeat {block=@layer, times=12}, 12 arrays of everything.
After:  repeat {block=@layer, times=12, order=(0,1,2,1,2,..)} and fewer arrays; what a layer keeps of its
        own (norms, deltas) is still stacked once a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from effc.ir.core import Func, Module, Op, Param, Ref, Value, all_ops, param_uses
from effc.ir.ops import attribute
from effc.ir.rewrite import Names, names_of, replace_ops
from effc.ir.types import BYTES, Quant, Type, evaluate
from effc.passes.base import Notes, PassError
from effc.passes.mor.low_rank import low_rank
from effc.passes.mor.sharing import Folding, Init
from effc.weights import Array, Arrays, Lazy, Store


@dataclass(frozen=True)
class Stack:
    """The repeated layers of a module: the op, its block, and their parameters, one array a layer."""

    func: Func
    op: Op
    block: Func
    params: tuple[Param, ...]

    @property
    def layers(self) -> int:
        times = self.op.attrs["times"]
        assert isinstance(times, int)
        return times


def find_stack(module: Module) -> Stack:
    """The heaviest `repeat` of the forward function; PassError where there is none that can be folded."""
    forward = module.forward()
    found = [_stack(module, forward, op) for op in forward.ops if op.kind == "repeat"]
    if not found:
        raise PassError(
            f"mor: @{forward.name} repeats no block, want equal layers in a row (its layers differ in ops or shapes)"
        )
    stack = max(found, key=lambda s: sum(_size(p) for p in s.params))
    _check(module, stack)
    return stack


def _stack(module: Module, func: Func, op: Op) -> Stack:
    target = op.attrs["block"]
    assert isinstance(target, Ref)
    block = module.funcs[target.name]
    names = dict.fromkeys(name for inner in block.ops for name in inner.params.values())
    return Stack(func, op, block, tuple(module.params[n] for n in names if module.params[n].stack))


def _size(param: Param) -> int:
    return param.count * evaluate(param.type.size(), {})


def _check(module: Module, stack: Stack) -> None:
    name = stack.block.name
    if attribute(stack.op, "order") or attribute(stack.op, "start") or "exits" in stack.op.attrs:
        raise PassError(f"mor: the layers of @{name} are folded or cut already, want a plain repeat of all of them")
    readers = {func.name for func, op in all_ops(module) if Ref(name) in op.attrs.values()}
    if readers != {stack.func.name} or sum(Ref(name) in op.attrs.values() for op in stack.func.ops) > 1:
        raise PassError(f"mor: @{name} is run by more than one op, want its layers in one repeat")
    for param in stack.params:
        if param.stack != stack.layers:
            raise PassError(f"mor: @{param.name} holds {param.stack} arrays for {stack.layers} layers, want one each")
        if isinstance(param.type.dtype, Quant):
            raise PassError(f"mor: @{param.name} is {param.type.dtype}, want floats: fold before quantizing")
        if any(func.name != name for func, _, _ in param_uses(module)[param.name]):
            raise PassError(f"mor: @{param.name} is read outside of @{name} too, want it read by its layers alone")


@dataclass(frozen=True)
class Fold:
    """What becomes of a stack: `rank` of the deltas (0 none, -1 exact), whether vectors are shared too."""

    stack: Stack
    folding: Folding
    init: Init
    rank: int
    share_vectors: bool
    damp: float | None = None
    """Factor of the norms of layers that run an array again, so that these move tokens less at first; None is 1."""

    def shared(self) -> list[Param]:
        """Parameters of which layers share arrays, as they are after."""
        return [
            replace(p, stack=self.folding.unique, path=f"{self.init} of {p.path or p.name}", over=None, perm=None)
            for p in self.stack.params
            if not self.keeps(p)
        ]

    def keeps(self, param: Param) -> bool:
        """Whether every layer keeps its own array of a parameter."""
        vector = len(param.type.shape) < 2 and not self.share_vectors
        exact = self.rank < 0 and param.name not in self.relaxed()
        return vector or exact or not _averages(param)

    def stream_norms(self) -> dict[str, float]:
        """Parameters of norms of the whole state that layers keep, and what the norm adds to them; none with deltas."""
        state = self.stack.op.outputs[0].type.shape
        norms = [op for op in self.stack.block.ops if op.kind == "norm" and op.out.type.shape == state]
        offsets = {"scale": "offset"}  # a bias is as it is
        found = {
            n: float(str(attribute(op, offsets.get(role, "")) or 0)) for op in norms for role, n in op.params.items()
        }
        mine = {p.name for p in self.stack.params if self.keeps(p)}
        return {} if self.rank else {name: added for name, added in found.items() if name in mine}

    def relaxed(self) -> dict[str, int]:
        """Rank of the delta of every matrix that gets one."""
        if not self.rank:
            return {}
        fit = [p for p in self.stack.params if _averages(p) and self._linear_only(p.name)]
        return {p.name: self._rank(p) for p in fit}

    def _rank(self, param: Param) -> int:
        full = min(evaluate(size, {}) for size in param.type.shape)
        return full if self.rank < 0 else min(self.rank, full)

    def _linear_only(self, name: str) -> bool:
        """Whether linears read it, all in one layout: only there is a product of two matrices another two linears."""
        readers = [(op, role) for op in self.stack.block.ops for role, n in op.params.items() if n == name]
        layouts = {attribute(op, "layout") for op, _ in readers}
        return all(op.kind == "linear" and role == "w" for op, role in readers) and len(layouts) == 1


def _averages(param: Param) -> bool:
    """Whether arrays can be mixed: floats."""
    return param.type.dtype in BYTES and str(param.type.dtype).startswith(("f", "bf"))


# ---- structure


def folded(module: Module, fold: Fold, notes: Notes) -> Module:
    """The module with the stack's arrays shared."""
    deltas = [param for name in fold.relaxed() for param in _delta_params(module, fold, name)]
    clash = next((p.name for p in deltas if p.name in module.params), None)
    if clash:
        raise PassError(f"mor: a parameter is called @{clash} already, want another name for what layers keep")
    block = _with_deltas(fold, fold.stack.block)
    order = replace(fold.stack.op, attrs={**fold.stack.op.attrs, "order": fold.folding.order()})
    func = replace_ops(fold.stack.func, lambda op: [order] if op is fold.stack.op else None)
    _told(fold, notes, [p for p in fold.stack.params if fold.keeps(p)])
    return module.with_func(block).with_func(func).with_params(*fold.shared(), *deltas)


def _told(fold: Fold, notes: Notes, kept: list[Param]) -> None:
    folding = fold.folding
    what = "in a cycle" if folding.cycle else "each in a row"
    notes.chose(
        f"layers {folding.first} to {folding.last - 1} of {folding.layers} share {folding.size} arrays {what}, "
        f"{folding.recursions} recursions: {folding.unique} arrays are left, made by {fold.init}"
    )
    if kept:
        notes.chose(f"{len(kept)} parameters a layer stay its own: {', '.join(p.name for p in kept)}")
    if fold.damp not in (None, 1.0):
        notes.chose(f"layers that run an array again begin with their norms x{fold.damp:g}")
    relaxed = fold.relaxed()
    if relaxed:
        notes.chose(f"low-rank deltas a layer, ranks {_ranks(relaxed)}: {', '.join(relaxed)}")
    for param in fold.shared() if fold.rank > 0 else []:
        if param.name not in relaxed and len(param.type.shape) > 1:
            notes.skip(param.name, "shared without a delta: not only linears read it")


def _ranks(relaxed: Mapping[str, int]) -> str:
    return " and ".join(map(str, sorted(set(relaxed.values()))))


def _delta_params(module: Module, fold: Fold, name: str) -> list[Param]:
    """B [K,r] and A [r,N] in the layout of the matrix they are added to; x goes through `down` first."""
    param, rank = module.params[name], fold.relaxed()[name]
    rows, columns = param.type.shape
    down, up = Type(param.type.dtype, (rows, rank)), Type(param.type.dtype, (rank, columns))
    return [
        Param(f"{name}.b", down, fold.stack.layers, f"delta of {name}"),
        Param(f"{name}.a", up, fold.stack.layers, f"delta of {name}"),
    ]


def _with_deltas(fold: Fold, block: Func) -> Func:
    """Before: y = linear(x) [w]. After: y = linear(x) [w] + linear(linear(x) [b]) [a] (nk: [a], then [b])."""
    relaxed, names = fold.relaxed(), names_of(block)

    def wider(op: Op) -> list[Op] | None:
        name = op.params.get("w", "")
        return _relaxed_ops(op, name, relaxed[name], names) if name in relaxed else None

    return replace_ops(block, wider) if relaxed else block


def _relaxed_ops(op: Op, base: str, rank: int, names: Names) -> list[Op]:
    out = op.out
    shared, low, high = (names.fresh(f"{out.name}.{part}") for part in ("shared", "low", "delta"))
    first, second = (f"{base}.b", f"{base}.a") if attribute(op, "layout") == "kn" else (f"{base}.a", f"{base}.b")
    narrow = Value(low, Type(out.type.dtype, (*out.type.shape[:-1], rank)))
    return [
        replace(op, outputs=(Value(shared, out.type),)),
        replace(op, outputs=(narrow,), params={"w": first}),
        replace(op, inputs=(low,), outputs=(Value(high, out.type),), params={"w": second}),
        Op("lax.add", (shared, high), (out,), {}, {}, {}, op.loc),
    ]


# ---- arrays


def made(fold: Fold, after: Module, store: Store) -> list[Lazy]:
    """Arrays of everything the fold made, read through those of the stack."""
    shared = [Lazy(param, _mixed(fold, store[param.name])) for param in fold.shared()]
    deltas = [lazy for name in fold.relaxed() for lazy in _deltas(fold, after, store[name])]
    damp = 1.0 if fold.damp is None else fold.damp
    damped = fold.stream_norms() if damp != 1 else {}
    kept = [Lazy(store[name].param, _damped(fold, store[name], damp, added)) for name, added in damped.items()]
    return [*shared, *deltas, *kept]


def _damped(fold: Fold, lazy: Lazy, damp: float, added: float) -> Callable[[int], Arrays]:
    """A norm's parameter; where a layer runs an array again the norm gives `damp` times what it gave."""

    def read(layer: int) -> Arrays:
        array = lazy.read(layer)[""]
        if not fold.folding.again(layer):
            return {"": array}
        return {"": ((array.astype(np.float32) + added) * damp - added).astype(array.dtype)}

    return read


def _mixed(fold: Fold, lazy: Lazy) -> Callable[[int], Arrays]:
    """The array that a shared one begins as: a copy of one layer's, or the mean of several."""
    sources = fold.folding.sources(fold.init)

    def read(array: int) -> Arrays:
        layers = sources[array]
        first = lazy.read(layers[0])[""]
        if len(layers) == 1:
            return {"": first}
        total = sum((lazy.read(layer)[""].astype(np.float32) for layer in layers[1:]), first.astype(np.float32))
        return {"": (total / np.float32(len(layers))).astype(first.dtype)}

    return read


def _deltas(fold: Fold, after: Module, lazy: Lazy) -> list[Lazy]:
    """B and A of every layer: what its matrix has that the shared one lacks."""
    base, rank, order = lazy.param.name, fold.relaxed()[lazy.param.name], fold.folding.order()
    shared = _mixed(fold, lazy)

    @lru_cache(maxsize=1)
    def both(layer: int) -> tuple[Array, Array]:
        own, common = lazy.read(layer)[""], shared(order[layer])[""]
        b, a = low_rank(own.astype(np.float32) - common.astype(np.float32), rank)
        return b.astype(own.dtype), a.astype(own.dtype)

    return [
        Lazy(after.params[f"{base}.b"], lambda layer: {"": both(layer)[0]}),
        Lazy(after.params[f"{base}.a"], lambda layer: {"": both(layer)[1]}),
    ]
