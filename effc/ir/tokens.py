"""Token-axis analysis: which values hold tokens, along which axis, and which ops keep tokens apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

from effc.ir.core import Op
from effc.ir.ops import ELEMENTWISE, OPS, Along
from effc.ir.types import Dim, Size, Type, depends, divide, name_dim, product


class Dep(IntEnum):
    """What a value depends on beyond the sizes of the call."""

    NOTHING = 0
    PARAMS = 1
    TOKENS = 2


def dependence(ops: Sequence[Op], inputs: Sequence[str]) -> dict[str, Dep]:
    """How far each value depends: function inputs are tokens."""
    known = dict.fromkeys(inputs, Dep.TOKENS)
    for op in ops:
        level = max((known[i] for i in op.inputs), default=Dep.NOTHING)
        if op.params:
            level = max(level, Dep.PARAMS)
        if op.kind == "positions":
            level = Dep.NOTHING
        known.update((value.name, level) for value in op.outputs)
    return known


def token_axes(type: Type) -> list[int]:
    """Axes whose size changes with the number of tokens."""
    return [axis for axis, size in enumerate(type.shape) if depends(size, "t")]


def keeps_tokens_apart(op: Op, types: Mapping[str, Type]) -> bool:
    """Whether rows of the results depend on the same rows of the operands only.

    Then running the op on the new tokens alone gives the rows that the whole sequence would.
    """
    row = OPS.get(op.kind)
    if row is not None:
        return row.along is not Along.MIXES
    ins, outs = [types[i] for i in op.inputs], [value.type for value in op.outputs]
    if any(len(token_axes(type)) > 1 for type in (*ins, *outs)):
        return False
    if op.kind in ELEMENTWISE or not any(token_axes(type) for type in ins):
        return not any(token_axes(type) for type in outs) or op.kind in ELEMENTWISE
    rule = _RULES.get(op.kind)
    return rule is not None and rule(op, ins, outs)


def _axis(type: Type) -> int:
    """The token axis, or -1."""
    axes = token_axes(type)
    return axes[0] if axes else -1


def _reshape(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    before, after = _before(ins[0]), _before(outs[0])
    return before is not None and before == after


def _before(type: Type) -> Size | None:
    """Number of blocks of t tokens in row-major order: what stands left of t."""
    axis = _axis(type)
    size = type.shape[axis]
    assert isinstance(size, Dim)
    left = product(type.shape[:axis])
    if not depends(size, "b"):
        return left
    per_batch = divide(size, name_dim("b"))
    return None if per_batch is None or depends(per_batch, "b") else _mul(left, name_dim("b"))


def _mul(left: Size, right: Dim) -> Size:
    return right * left


def _transpose(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    return True


def _broadcast(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    dims = op.attrs["dims"]
    assert isinstance(dims, tuple)
    return dims[_axis(ins[0])] == _axis(outs[0])


def _not_along(*names: str) -> object:
    def rule(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
        axes: list[object] = []
        for name in names:
            attr = op.attrs.get(name)
            axes += attr if isinstance(attr, tuple) else [attr]
        return all(_axis(x) not in axes for x in ins if token_axes(x))

    return rule


def _last_axis(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    return _axis(ins[0]) != len(ins[0].shape) - 1


def _slice(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    axis, start, limit, strides = _axis(ins[0]), op.attrs["start"], op.attrs["limit"], op.attrs.get("strides")
    assert isinstance(start, tuple) and isinstance(limit, tuple)
    whole = start[axis] == 0 and limit[axis] == ins[0].shape[axis]
    return whole and (not isinstance(strides, tuple) or strides[axis] == 1)


def _pad(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    axis = _axis(ins[0])
    widths = [op.attrs[name] for name in ("low", "high", "interior")]
    return all(isinstance(w, tuple) and w[axis] == 0 for w in widths) and not token_axes(ins[1])


def _dot(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    contract, batch = op.attrs["contract"], op.attrs.get("batch", ((), ()))
    assert isinstance(contract, tuple) and isinstance(batch, tuple)
    axes = [_axis(x) for x in ins]
    if any(axis in side for axis, side in zip(axes, contract, strict=True) if axis >= 0):  # type: ignore[operator]
        return False
    if min(axes) < 0:
        return True
    return all(axis in side for axis, side in zip(axes, batch, strict=True))  # type: ignore[operator]


def _gather(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    operand, indices = ins
    if not token_axes(operand):
        return _axis(indices) != len(indices.shape) - 1
    batch = op.attrs.get("batch", ((), ()))
    assert isinstance(batch, tuple) and isinstance(batch[0], tuple) and isinstance(batch[1], tuple)
    pairs = list(zip(batch[0], batch[1], strict=True))
    return (_axis(operand), _axis(indices)) in pairs


def _split(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    return op.attrs["axis"] != _axis(ins[0])


def _tile(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    reps = op.attrs["reps"]
    assert isinstance(reps, tuple)
    return reps[_axis(ins[0]) - len(ins[0].shape)] == 1 and len(reps) == len(ins[0].shape)


def _stack(op: Op, ins: Sequence[Type], outs: Sequence[Type]) -> bool:
    return len({_axis(x) for x in ins}) == 1


_RULES = {
    "lax.reshape": _reshape, "lax.transpose": _transpose, "lax.broadcast_in_dim": _broadcast,
    "lax.reduce_sum": _not_along("axes"), "lax.reduce_max": _not_along("axes"), "lax.reduce_min": _not_along("axes"),
    "lax.reduce_prod": _not_along("axes"), "lax.reduce_and": _not_along("axes"), "lax.reduce_or": _not_along("axes"),
    "lax.argmax": _not_along("axis"), "lax.argmin": _not_along("axis"), "lax.cumsum": _not_along("axis"),
    "lax.cumprod": _not_along("axis"), "lax.cummax": _not_along("axis"), "lax.cummin": _not_along("axis"),
    "lax.cumlogsumexp": _not_along("axis"), "lax.sort": _not_along("dimension"), "lax.rev": _not_along("dimensions"),
    "lax.concatenate": _not_along("dimension"), "lax.top_k": _last_axis, "lax.slice": _slice, "lax.pad": _pad,
    "lax.dot_general": _dot, "lax.gather": _gather, "lax.split": _split, "lax.tile": _tile, "lax.stack": _stack,
}  # fmt: skip
