"""A dump edited by hand in place of what the lowering gives: it must still be the checkpoint's model."""

from __future__ import annotations

from pathlib import Path

from effc.artifact import read_module
from effc.errors import EffcError, nearest
from effc.ir.core import Module
from effc.ir.types import Quant
from effc.passes.runner import check_module


def edited_module(origin: Module, file: Path | None) -> Module | None:
    """The module of `file`, its parameters those of `origin`, perhaps coded; EffcError where they are not."""
    if file is None:
        return None
    module = read_module(file)
    check_module(str(file), module)
    for name in module.params:
        _check_param(file, origin, module, name)
    return module


def _check_param(file: Path, origin: Module, module: Module, name: str) -> None:
    """A parameter of the file must be one of the checkpoint, perhaps coded."""
    if name not in origin.params:
        near = nearest(name, origin.params)
        raise EffcError(
            f"{file}: @{name} is no parameter of the checkpoint's own IR{near} (edit a dump from before fuse)"
        )
    was, now = origin.params[name], module.params[name]
    same = (was.type.shape, was.stack, was.path, was.over, was.perm)
    if same != (now.type.shape, now.stack, now.path, now.over, now.perm):
        raise EffcError(
            f"{file}: @{name} is {now.stack} * {now.type} of '{now.path}', "
            f"want {was.stack} * {was.type} of '{was.path}' as in the checkpoint"
        )
    if was.type != now.type and not isinstance(now.type.dtype, Quant):
        raise EffcError(f"{file}: @{name} is {now.type.dtype}, want {was.type.dtype} as in the checkpoint, or q2 to q8")
