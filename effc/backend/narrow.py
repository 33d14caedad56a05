"""Blocks that keep what they do not make of x: of x the rows that are asked for suffice, others only keep.

In a prompt the last token's logits are wanted. Where keys and values are of another state (SwiftKV, arXiv
2410.03960), layers run on that token alone, and the rest of the prompt costs its keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from effc.backend.plan import CACHED, by_call, by_token, reads
from effc.ir.core import Func, Op, Ref
from effc.ir.ops import kept
from effc.ir.rewrite import producers


@dataclass(frozen=True)
class Parts:
    """Ops that make what is kept, on all rows; the others; the values that these read, rows asked for alone."""

    keeps: tuple[Op, ...]
    others: tuple[Op, ...]
    narrowed: tuple[str, ...]


def parts(block: Func) -> Parts | None:
    """None where the block needs all rows of its first operand."""
    attentions = [op for op in block.ops if op.kind == "attention"]
    if not attentions or any(_odd(op) for op in block.ops):
        return None
    source = producers(block)
    stored = [name for op in attentions for name in kept(op)]
    made, read, todo = set[str](), set[str](), list(stored)
    while todo:
        name = todo.pop()
        read.add(name)
        if name in source and name not in made:
            made |= {value.name for value in source[name].outputs}
            todo += source[name].inputs
    keeps = tuple(op for op in block.ops if op.outputs[0].name in made)
    others = tuple(op for op in block.ops if op not in keeps)
    if block.inputs[0].name in read or any(op.kind == "attention" for op in keeps):
        return None
    return _narrowed(block, keeps, others, {*stored})


def _narrowed(block: Func, keeps: tuple[Op, ...], others: tuple[Op, ...], stored: set[str]) -> Parts | None:
    own = {value.name for op in others for value in op.outputs}
    types, wanted = block.types(), list[str]()
    for op in others:
        rows = [op.inputs[0], *op.inputs[1 + len(kept(op)) :]] if op.kind == "attention" else reads(op)
        wanted += [name for name in rows if name not in own and by_call(types[name])]
    if any(name in stored or not by_token(types[name]) for name in wanted) or {*block.results} - own:
        return None
    return Parts(keeps, others, tuple(dict.fromkeys(wanted)))


def _odd(op: Op) -> bool:
    """What looks at other rows in a way of its own, or runs what might."""
    looks = op.kind in CACHED - {"attention"} or any(isinstance(value, Ref) for value in op.attrs.values())
    return looks or bool(op.regions)


__all__ = ["Parts", "parts"]
