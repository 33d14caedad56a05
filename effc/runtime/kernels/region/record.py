"""Layers as single equations of a traced program, so that what they are can be told from the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_on: ContextVar[bool] = ContextVar("record", default=False)

LAYER = Primitive("effc_layer")
"""Parameters: name of the layer, its function, keywords, and the tree of its arguments."""


@contextmanager
def recording(on: bool = True) -> Iterator[None]:
    """Layers traced inside become equations."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def recording_now() -> bool:
    """Whether layers become equations."""
    return _on.get()


def recorded(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, or under `recording` an equation that stands for it; arrays must be positional."""

    @wraps(function)
    def call(*args: Any, **keywords: Any) -> jax.Array:
        if not _on.get():
            return function(*args, **keywords)
        leaves, tree = jax.tree.flatten(args)
        if not all(isinstance(leaf, jax.Array) for leaf in leaves):  # a function among them: nothing to record
            return function(*args, **keywords)
        return LAYER.bind(
            *leaves, name=function.__name__, function=function, keywords=tuple(keywords.items()), tree=tree
        )

    return call


def reference(*leaves: Any, name: str, function: Callable[..., Any], keywords: Any, tree: Any) -> Any:
    """What the equation stands for, in JAX's own ops."""
    with recording(False):
        return function(*jax.tree.unflatten(tree, leaves), **dict(keywords))


@cache
def _shape(avals: Any, options: Any) -> Any:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals]
    return jax.eval_shape(lambda *leaves: reference(*leaves, **dict(options)), *shapes)


@LAYER.def_abstract_eval
def _abstract(*avals: Any, **options: Any) -> Any:
    out = _shape(tuple((aval.shape, aval.dtype) for aval in avals), tuple(options.items()))
    return jax.core.ShapedArray(out.shape, out.dtype)  # pyright: ignore[reportAttributeAccessIssue]


@LAYER.def_impl
def _run(*leaves: Any, **options: Any) -> Any:
    return reference(*leaves, **options)


def _batched(leaves: Any, axes: Any, **options: Any) -> Any:
    return jax.vmap(lambda *args: reference(*args, **options), in_axes=axes)(*leaves), 0


# Where an equation stays one (mapped, or inside a transformation that regions do not look into).
batching.primitive_batchers[LAYER] = _batched
mlir.register_lowering(LAYER, mlir.lower_fun(reference, multiple_results=False))
