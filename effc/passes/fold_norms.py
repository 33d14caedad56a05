"""linear(norm(x) * s + b) = linear'(norm(x)): the norm's scale and bias move into the linears behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from effc.ir.core import Func, Module, Op, Param, param_uses, walk
from effc.ir.types import Quant
from effc.passes.base import Notes
from effc.weights import Array, Arrays, Lazy


@dataclass(frozen=True)
class Fold:
    """A norm of a function and every linear that reads it."""

    func: str
    norm: Op
    linears: tuple[Op, ...]


def run(module: Module, notes: Notes) -> Module:
    """The module with norm scales folded where that is exact but for rounding."""
    for fold in plan(module, notes):
        module = _folded(module, fold)
        names = ", ".join(op.params["w"] for op in fold.linears)
        notes.chose(f"{fold.norm.params['scale']} folded into {names}")
    used = {name for name, uses in param_uses(module).items() if uses}
    return replace(module, params={n: p for n, p in module.params.items() if n in used})


def plan(module: Module, notes: Notes) -> list[Fold]:
    """Every norm that can be folded; the others, with the reason, to `notes`."""
    counts = {name: len(uses) for name, uses in param_uses(module).items()}
    folds: list[Fold] = []
    for func in module.funcs.values():
        for op in func.ops:
            if op.kind == "norm" and "scale" in op.params:
                readers, why = _readers(func, op)
                why = why or _why_not(module, op, readers, counts)
                if why:
                    notes.skip(op.params["scale"], why)
                else:
                    folds.append(Fold(func.name, op, readers))
    return folds


def _readers(func: Func, norm: Op) -> tuple[tuple[Op, ...], str]:
    """The linears that read the norm, or why not all its readers are linears."""
    name = norm.out.name
    if name in func.results:
        return (), "the norm is a result"
    readers = tuple(op for op in walk(func) if name in op.inputs or any(name in r.results for r in op.regions.values()))
    odd = next((op.kind for op in readers if op.kind != "linear"), "" if readers else "nothing")
    return readers, f"the norm is read by '{odd}', not by linears alone" if odd else ""


def _why_not(module: Module, norm: Op, linears: tuple[Op, ...], counts: Mapping[str, int]) -> str:
    stacked = any(module.params[name].stack for name in norm.params.values())
    for op in linears:
        w = module.params[op.params["w"]]
        if isinstance(w.type.dtype, Quant):
            return f"{w.name} is {w.type.dtype}: scaling it would not be exact"
        if any(counts[name] > 1 for name in op.params.values()):
            return f"{w.name} or its bias is read by other ops too"
        if stacked and not w.stack:
            return f"{w.name} is one array for all layers, the norm has one a layer"
    return ""


def _folded(module: Module, fold: Fold) -> Module:
    func = module.funcs[fold.func]
    changed = {id(op): _behind(module, op, fold) for op in fold.linears}
    plain = {name: value for name, value in fold.norm.attrs.items() if name != "offset"}
    changed[id(fold.norm)] = replace(fold.norm, params={}, attrs=plain)
    module = module.with_params(*(p for op in fold.linears for p in _params(module, op, fold)))
    return module.with_func(replace(func, ops=tuple(changed.get(id(op), op) for op in func.ops)))


def _behind(module: Module, op: Op, fold: Fold) -> Op:
    """The linear, with a bias of its own where the norm had one."""
    if "bias" not in fold.norm.params:
        return op
    return replace(op, params={**op.params, "bias": _bias_name(module, op)})


def _bias_name(module: Module, op: Op) -> str:
    return op.params.get("bias") or f"{op.params['w']}.bias"


def _params(module: Module, op: Op, fold: Fold) -> list[Param]:
    """The linear's parameters after: same names and types, made of more."""
    w, scale = module.params[op.params["w"]], fold.norm.params["scale"]
    out = [replace(w, path=f"{w.name} * {scale}", over=None, perm=None)]
    if "bias" in fold.norm.params:
        shift, old = fold.norm.params["bias"], op.params.get("bias")
        path = f"{shift} @ {w.name}" + (f" + {old}" if old else "")
        type_ = replace(module.params[shift].type, shape=(w.type.shape[_out_axis(op)],))
        out.append(Param(_bias_name(module, op), type_, w.stack, path))
    return out


def _out_axis(op: Op) -> int:
    return -1 if op.attrs.get("layout", "kn") == "kn" else -2


# ---- arrays


def made(module: Module, store: Mapping[str, Lazy]) -> list[Lazy]:
    """Arrays of every parameter that changed; products in f64, so that folding rounds once."""
    out: list[Lazy] = []
    for fold in plan(module, Notes()):
        for op in fold.linears:
            params = _params(module, op, fold)
            out.append(Lazy(params[0], _scaled(op, fold, store)))
            out += [Lazy(bias, _shifted(op, fold, store)) for bias in params[1:]]
    return out


def _scaled(op: Op, fold: Fold, store: Mapping[str, Lazy]) -> Callable[[int], Arrays]:
    offset = fold.norm.attrs.get("offset", 0.0)
    assert isinstance(offset, int | float)

    def read(layer: int) -> Arrays:
        w = _read(store, op.params["w"], layer)
        scale = _read(store, fold.norm.params["scale"], layer).astype(np.float64) + offset
        wide = scale[:, None] if _out_axis(op) == -1 else scale[None, :]
        return {"": (w * wide).astype(w.dtype)}

    return read


def _shifted(op: Op, fold: Fold, store: Mapping[str, Lazy]) -> Callable[[int], Arrays]:
    def read(layer: int) -> Arrays:
        w = _read(store, op.params["w"], layer).astype(np.float64)
        shift = _read(store, fold.norm.params["bias"], layer)
        moved = shift.astype(np.float64) @ (w if _out_axis(op) == -1 else w.T)
        if "bias" in op.params:
            moved = moved + _read(store, op.params["bias"], layer)
        return {"": moved.astype(shift.dtype)}

    return read


def _read(store: Mapping[str, Lazy], name: str, layer: int) -> Array:
    lazy = store[name]
    return lazy.read(layer if lazy.param.stack else 0)[""]
