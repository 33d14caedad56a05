"""Readable names for values: after the parameter they came from, or after what they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from effc.ir.core import Func, Module, Op, Ref

SHORT = {
    "attention": "attn", "lax.transpose": "tr", "lax.add": "sum", "lax.mul": "prod", "repeat": "x",
    "embed": "x", "positions": "pos", "const": "c", "lax.convert_element_type": "cast", "param": "p", "window": "w",
}  # fmt: skip
_DULL = {"kernel", "embedding", "scale", "weight", "w", "bias", "table", "value"}


def rename_values(module: Module) -> Module:
    """The module with every value named for a reader."""
    asked: dict[str, list[str]] = {}
    for func in reversed(list(module.funcs.values())):  # callers before the blocks they run
        named = _renamed(func, asked.get(func.name, []))
        module = module.with_func(named)
        for op in named.ops:
            block = op.attrs.get("block")
            if isinstance(block, Ref):
                carry = op.attrs.get("carry", 1)
                asked[block.name] = [
                    *([""] * carry if isinstance(carry, int) else []),
                    *op.inputs[len(op.outputs) :],
                ]
    return module


def _renamed(func: Func, asked: Sequence[str]) -> Func:
    """Inputs take the names they have where the block is run."""
    names = {v.name: hint for v, hint in zip(func.inputs, asked, strict=False) if hint}
    names |= {v.name: v.name for v in func.inputs if v.name not in names and not re.fullmatch(r"v\d+(\.\d+)?", v.name)}
    taken = set(names.values())
    for value in func.inputs:
        if value.name not in names:
            names[value.name] = _free("c", taken)
    for op in func.ops:
        for k, value in enumerate(op.outputs):
            names[value.name] = _free(_hint(op, k, [names[i] for i in op.inputs[:1]]), taken)
    if len(func.results) == 1 and not func.block and func.results[0] in names:
        names[func.results[0]] = "logits" if "logits" not in taken else names[func.results[0]]
    ops = tuple(_with_names(op, names) for op in func.ops)
    inputs = tuple(replace(v, name=names[v.name]) for v in func.inputs)
    return replace(func, inputs=inputs, ops=ops, results=tuple(names[r] for r in func.results))


def _with_names(op: Op, names: dict[str, str]) -> Op:
    outputs = tuple(replace(v, name=names[v.name]) for v in op.outputs)
    return replace(op, inputs=tuple(names[i] for i in op.inputs), outputs=outputs)


def _hint(op: Op, k: int, operand: Sequence[str]) -> str:
    """operand: the name of the first operand, if there is one."""
    if op.kind == "rope_table":
        return ("cos", "sin")[k]
    if operand and op.kind in CHANGED:
        return _changed(op, operand[0])
    weight = op.params.get("w") or op.params.get("scale")
    if op.kind in {"linear", "norm"} and weight:
        parts = [re.sub(r"\W", "_", p) for p in weight.split(".") if p not in _DULL and not p.isdigit()]
        if parts:
            return re.sub(r"^(\d)", r"n\1", parts[-1].lower())
    return SHORT.get(op.kind, re.sub(r"^lax\.", "", op.kind))


CHANGED = {"lax.reshape", "rope"}


def _changed(op: Op, operand: str) -> str:
    """q -> q_heads -> q_rope: the same thing in another form."""
    stem = re.sub(r"_(heads|flat|rope)\d*$", "", operand)
    if op.kind == "rope":
        return f"{stem}_rope"
    return f"{stem}_heads" if len(op.out.type.shape) > 3 else f"{stem}_flat"


def _free(hint: str, taken: set[str]) -> str:
    name, turn = hint, 1
    while name in taken:
        name, turn = f"{hint}{turn}", turn + 1
    taken.add(name)
    return name
