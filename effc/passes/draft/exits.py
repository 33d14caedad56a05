"""Drafts by the model's own early exits: each leaves at the first one, and verification runs all layers.

What skipped layers keep of a draft lies in the target's own cache, whose rows verification writes again.
"""

from __future__ import annotations

from dataclasses import replace

from effc.ir.core import Attr, Decode, Module, Op, Ref
from effc.ir.rewrite import replace_ops
from effc.passes.base import Notes


def attached(module: Module, gamma: int, notes: Notes) -> Module:
    """The module, which tokens leave early, with that as its drafter."""
    assert module.decode is not None
    early = module.decode.attrs["early"]
    assert isinstance(early, Ref)
    attrs: dict[str, Attr | Ref] = {
        "forward": Ref(module.forward().name), "kind": "exits", "drafter": early, "shared": True, "gamma": gamma,
    }  # fmt: skip
    notes.chose("drafts leave at the first exit, and all layers verify them: the text is the full model's own")
    module = module.with_func(replace_ops(module.funcs[early.name], _always))
    return replace(module, decode=Decode("speculative", attrs))


def _always(op: Op) -> list[Op] | None:
    """Every token leaves at the first exit; verification makes up for what it left out."""
    waits = ("state", "waiting") if op.attrs.get("state") == "deferred" else ()
    attrs = {name: value for name, value in op.attrs.items() if name not in waits}
    return [replace(op, attrs={**attrs, "threshold": 0.0})] if op.kind == "early" else None


__all__ = ["attached"]
