"""Functions that one platform alone runs, in programs lowered for several at once.

JAX lowers each branch of `platform_dependent` for all platforms of an export, and a Pallas kernel for TPUs has no
lowering for CPUs. Here such a function is one equation whose inside is lowered for its own platform only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

ALONE = Primitive("effc_alone")
"""Operands: constants of `inside`, so many, then its inputs; platform: the one that runs it."""
ALONE.multiple_results = True


def alone(platform: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays for that platform, whatever others the program is for."""

    def call(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        trace = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(tree, flat)), return_shape=True)
        made, shapes = trace(*leaves)
        count = len(made.consts)
        out = ALONE.bind(*made.consts, *leaves, inside=made.jaxpr, constants=count, platform=platform)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return call


def _run(*args: Any, inside: Jaxpr, constants: int, platform: str) -> Sequence[Any]:
    return jaxpr_as_fun(ClosedJaxpr(inside, args[:constants]))(*args[constants:])


@ALONE.def_abstract_eval
def _abstract(*_: Any, inside: Jaxpr, **__: Any) -> Sequence[Any]:
    return [var.aval for var in inside.outvars]


def _batched(args: Any, axes: Any, **options: Any) -> Any:
    mapped = alone(options["platform"], jax.vmap(lambda *given: _run(*given, **options), in_axes=axes))
    out = mapped(*args)
    return out, [0] * len(out)


def _lowered(context: mlir.LoweringRuleContext, *args: Any, **options: Any) -> Any:
    # Functions lowered once for this platform are kept beside those for all, and apart from them.
    whole = context.module_context
    kept = whole.cached_primitive_lowerings.setdefault((ALONE, options["platform"]), {})
    module = whole.replace(platforms=(options["platform"],), cached_primitive_lowerings=kept)
    return mlir.lower_fun(_run, multiple_results=True)(context.replace(module_context=module), *args, **options)


ALONE.def_impl(lambda *args, **options: jax.jit(lambda *given: _run(*given, **options))(*args))
batching.primitive_batchers[ALONE] = _batched
mlir.register_lowering(ALONE, _lowered)
