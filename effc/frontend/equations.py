"""What the equations of a jaxpr say beside their primitive: where they stand, what they call, who needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.errors import EffcError
from effc.ir.core import Loc


def needed(jaxpr: Any, wanted: Sequence[bool] | None = None) -> list[tuple[Any, list[bool]]]:
    """The equations that the wanted results need, each with which of its own results are needed."""
    flags = [True] * len(jaxpr.outvars) if wanted is None else wanted
    live = {id(v) for v, flag in zip(jaxpr.outvars, flags, strict=True) if flag}
    found: list[tuple[Any, list[bool]]] = []
    for equation in reversed(jaxpr.eqns):
        used = [id(v) in live for v in equation.outvars]
        if any(used):
            live.update(map(id, equation.invars))
            found.append((equation, used))
    return found[::-1]


def scan_counts(equation: Any) -> tuple[int, int]:
    """How many constants and carries a scan has: what is scanned or collected has one axis more outside."""
    body = equation.params["jaxpr"].jaxpr
    scanned = sum(len(v.aval.shape) > len(b.aval.shape) for v, b in zip(equation.invars, body.invars, strict=True))
    collected = sum(len(v.aval.shape) > len(b.aval.shape) for v, b in zip(equation.outvars, body.outvars, strict=True))
    carry = len(equation.outvars) - collected
    return len(equation.invars) - carry - scanned, carry


def location(equation: Any) -> Loc:
    """Flax module path, and the user's source line, of an equation."""
    info = equation.source_info
    stack = str(info.name_stack)
    for frame in info.traceback.frames if info.traceback else ():
        path = str(frame.file_name)
        if not any(f"/{package}/" in path for package in ("jax", "flax", "_src")) and not path.startswith("<"):
            return Loc(stack, "/".join(path.rsplit("/", 2)[-2:]), int(frame.line_num))
    return Loc(stack)


def of_library(equation: Any) -> bool:
    """Whether a called function is JAX's or Flax's own: traced once, its ops tell of the first call only."""
    jaxpr = callee(equation)
    info = getattr(getattr(jaxpr, "jaxpr", jaxpr), "debug_info", None)
    source = str(getattr(info, "func_src_info", ""))
    return any(f"/{package}/" in source for package in ("jax", "flax"))


def callee(equation: Any) -> Any:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in equation.params:
            return equation.params[key]
    raise EffcError(f"{location(equation)}: call '{equation.primitive.name}' holds no program effc can read")
