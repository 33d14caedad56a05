"""What the options of `calm` ask of a module: where exits are, and what does not go together, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effc.backend.plan import by_call, by_token
from effc.ir.core import Module
from effc.passes.base import PassError
from effc.passes.calm import adapters
from effc.passes.calm.shape import Shape

if TYPE_CHECKING:
    from effc.passes.calm.calm import Calm


def exits_of(made_by: Calm, layers: int, order: tuple[int, ...] = ()) -> tuple[int, ...]:
    """After how many layers tokens may leave; PassError where that is nowhere.

    Where layers share arrays, order[i] that of layer i, tokens leave between recursions unless asked otherwise.
    """
    first = made_by.first or max(1, layers // 3)
    every = made_by.every or max(1, layers // 3)
    if made_by.first < 0 or made_by.every < 0 or made_by.min_exit < 1:
        raise PassError("calm: first and every want 0 or more, min_exit 1 or more")
    ends = tuple(place for place in range(made_by.min_exit, len(order)) if order[place] < order[place - 1])
    if ends and not (made_by.first or made_by.every):
        return ends if made_by.state == "propagate" else ends[:1]
    if made_by.state != "propagate" and not made_by.every:
        every = layers
    at = tuple(place for place in range(first, layers, every) if place >= made_by.min_exit)
    if not at:
        raise PassError(
            f"calm: no exit from {max(first, made_by.min_exit)} on in {layers} layers, want one before the last"
        )
    return at


def check_state(made_by: Calm, shape: Shape) -> None:
    """PassError where tokens cannot wait: they take along what layers read of them, token by token."""
    if made_by.waiting < 1:
        raise PassError(f"calm: waiting is {made_by.waiting}, want 1 or more tokens")
    if made_by.state == "propagate":
        return
    if len(exits_of(made_by, shape.layers, shape.order)) > 1:
        why = "tokens wait for all layers after it" if made_by.state == "deferred" else "its state is what layers keep"
        raise PassError(f"calm: state={made_by.state}, want one exit: {why}")
    if made_by.state == "shared":
        _check_shared(made_by, shape)
        return
    types = shape.forward.types()
    other = next((n for n in shape.repeat.inputs if by_call(types[n]) and not by_token(types[n])), None)
    if other:
        raise PassError(f"calm: layers read %{other}, {types[other]}, want [b,t,...] of them with state=deferred")


def check_head(made_by: Calm, shape: Shape, module: Module) -> None:
    if made_by.head == "model":
        return
    if made_by.measure not in ("softmax", "softmax_max"):
        raise PassError(f"calm: head=own with measure={made_by.measure}, want softmax or softmax_max: by that head")
    adapters.own_head(shape.head, module)


def _check_shared(made_by: Calm, shape: Shape) -> None:
    if not made_by.finetune:
        raise PassError("calm: state=shared changes what layers read, want finetune=true: they learn to")
    if shape.order:
        raise PassError("calm: state=shared, want arrays of each layer's own: these run at several depths")


def check_texts(made_by: Calm, module: Module) -> None:
    """PassError for texts that cannot be generated: asked before anything is trained."""
    if made_by.prompt < 1 or made_by.prompts < 1 or made_by.tokens < 2:
        raise PassError("calm: prompts and prompt want 1 or more, tokens 2 or more: the first comes with the prompt")
    context, length = module.meta.get("context"), made_by.prompt + made_by.tokens
    if isinstance(context, int) and 0 < context < length:
        raise PassError(f"calm: prompt and tokens are {length} together, want at most the context of {context}")


__all__ = ["check_head", "check_state", "check_texts", "exits_of"]
