"""One of two functions on a state, as one equation of a traced program: native regions take both sides in.

Elsewhere it is two loops of at most one turn, not a conditional: XLA updates what a loop carries in place, and
copies the caches that the branches of a conditional return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import mlir

from effc.runtime.kernels.region.record import recording, recording_now

State = TypeVar("State")

BRANCH = Primitive("effc_branch")
"""Operands: flags, the state, what `on` reads beside it, what `off` reads. Parameters: both functions' jaxprs with
that as their constants, and the counts of these."""
BRANCH.multiple_results = True


def either(flags: jax.Array, on: Callable[[State], State], off: Callable[[State], State], state: State) -> State:
    """off(state) where all of the numbers f32[b,t] are other than 0, else on(state); states are of one structure."""
    if not recording_now():
        return _loops(flags, on, off, state)
    leaves, tree = jax.tree.flatten(state)

    def flat(function: Callable[[State], State]) -> ClosedJaxpr:
        return jax.make_jaxpr(lambda *args: jax.tree.leaves(function(jax.tree.unflatten(tree, args))))(*leaves)

    sides = [flat(on), flat(off)]
    consts = [const for side in sides for const in side.consts]
    counts = tuple(len(side.consts) for side in sides)
    out = BRANCH.bind(flags, *leaves, *consts, on=sides[0].jaxpr, off=sides[1].jaxpr, counts=counts)
    return jax.tree.unflatten(tree, out)


def _loops(flags: jax.Array, on: Callable[[State], State], off: Callable[[State], State], state: State) -> State:
    gone = jnp.all(flags != 0)

    def once(wanted: jax.Array, function: Callable[[State], State], state: State) -> State:
        done = jnp.zeros((), bool)
        return lax.while_loop(lambda carry: carry[1], lambda carry: (function(carry[0]), done), (state, wanted))[0]

    return once(gone, off, once(~gone, on, state))


def operands(args: Any, counts: tuple[int, int]) -> tuple[Any, list[Any], list[Any], list[Any]]:
    """Flags, state, and what each side reads beside it."""
    first = len(args) - sum(counts)
    return args[0], list(args[1:first]), list(args[first : first + counts[0]]), list(args[first + counts[0] :])


def reference(*args: Any, on: Any, off: Any, counts: tuple[int, int], inner: Callable[[Any], Any] = lambda x: x) -> Any:
    """What the equation stands for; `inner` may make another function of a side."""
    flags, state, *consts = operands(args, counts)
    sides = [inner(jaxpr_as_fun(ClosedJaxpr(side, own))) for side, own in zip((on, off), consts, strict=True)]
    first, second = (lambda state, side=side: list(side(*state)) for side in sides)
    with recording(False):
        return _loops(flags, first, second, state)


@BRANCH.def_abstract_eval
def _abstract(*avals: Any, on: Any, **_: Any) -> Any:
    out: list[Any] = [var.aval for var in on.outvars]
    return [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in out]  # pyright: ignore[reportAttributeAccessIssue]


BRANCH.def_impl(reference)
mlir.register_lowering(BRANCH, mlir.lower_fun(reference, multiple_results=True))
