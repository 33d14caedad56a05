"""Run a piece of a graph on numbers, and ask whether it computes a known function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effc.frontend.graph import Graph
from effc.ir.core import Op
from effc.ir.interpret import Context, apply
from effc.ir.types import NUMPY, evaluate

Array = jax.Array
SIZES = {"b": 2, "t": 3}


class Unseen(Exception):
    """Why a value could not be understood."""


def run_region(
    graph: Graph, roots: Sequence[str], feeds: Mapping[str, object], sizes: Mapping[str, int] = SIZES,
    params: Mapping[str, object] | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Values of `roots` when the values in `feeds` are given; parameters by name from `params`."""
    dtypes = {name: NUMPY[str(graph.type(name).dtype)] for name in feeds}
    given = {graph.find(name): jnp.asarray(x, dtypes[name]) for name, x in feeds.items()}
    ops = region(graph, roots, set(given))
    weights = {name: jnp.asarray((params or {})[name]) for op in ops for name in op.params.values()}

    def program(values: dict[str, Array], weights: Mapping[str, Array]) -> list[Array]:
        values = dict(values)
        context = Context(
            dict(sizes), jnp.broadcast_to(jnp.arange(sizes["t"], dtype=jnp.int32), (sizes["b"], sizes["t"]))
        )
        for op in ops:
            mine = {role: weights[name] for role, name in op.params.items()}
            results = apply(op, [values[i] for i in op.inputs], mine, context)
            values.update(zip((v.name for v in op.outputs), results, strict=True))
        return [values[graph.find(r)].astype(jnp.float32) for r in roots]

    return [np.asarray(x) for x in jax.jit(program)(given, weights)]  # compiled whole: far quicker than op by op


def constant_of(graph: Graph, name: str) -> np.ndarray | None:
    """The fixed array that a parameter is, in the parameter's own shape; None for a weight."""
    param = graph.params[name]
    array = graph.constants.get(param.path)
    if array is None:
        return None
    moved = array if param.perm is None else array.transpose(param.perm)
    return moved.reshape([evaluate(size, {}) for size in param.type.shape])


def region(graph: Graph, roots: Iterable[str], stop: Iterable[str], limit: int = 1 << 30) -> list[Op]:
    """Ops that compute `roots` from the values in `stop`, in order; more than `limit` are cut off."""
    done = {graph.find(name) for name in stop}
    ordered: list[Op] = []
    stack: list[tuple[str, bool]] = [(graph.find(r), False) for r in roots]
    while stack:
        name, ready = stack.pop()
        op = graph.op(name)
        if name in done or op is None:
            continue
        if ready:
            done.update(v.name for v in op.outputs)
            ordered.append(op)
            continue
        if len(ordered) + len(stack) > 2 * limit:
            return [*ordered, *(op for _ in range(limit + 1))]
        stack.append((name, True))
        stack.extend((i, False) for i in reversed(op.inputs) if i not in done)
    return ordered


def signature(graph: Graph, roots: Sequence[str], feeds: Sequence[str]) -> str:
    """Text equal for regions that compute the same function of `feeds` (parameters told apart by type)."""
    names = {graph.find(name): f"#{i}:{graph.type(name)}" for i, name in enumerate(feeds)}
    lines = list[str]()
    for op in region(graph, roots, names):
        params = ",".join(_told(graph, p) for p in op.params.values())
        operands = ",".join(names.get(i, f"?{i}") for i in op.inputs)
        lines.append(f"{op.kind}({operands})[{params}]{sorted(op.attrs.items(), key=str)}->{op.outputs[0].type}")
        names.update((v.name, f"${len(lines)}.{k}") for k, v in enumerate(op.outputs))
    return "\n".join([*lines, ",".join(names.get(graph.find(r), "?") for r in roots)])


def _told(graph: Graph, param: str) -> str:
    """A parameter's type; of a fixed array, which one it is."""
    known = graph.params[param]
    return f"{known.type} {param}" if known.path in graph.constants else str(known.type)


def peel(graph: Graph, name: str, kinds: Iterable[str]) -> str:
    """The value behind a chain of one-operand ops of these kinds."""
    allowed = frozenset(kinds)
    op = graph.op(name)
    while op is not None and op.kind in allowed:
        name = op.inputs[0]
        op = graph.op(name)
    return graph.find(name)


SHAPING = frozenset({"lax.reshape", "lax.broadcast_in_dim", "lax.convert_element_type", "lax.transpose"})
"""Ops that move or repeat elements, or round them, and compute nothing."""


def close(x: np.ndarray, y: np.ndarray, tolerance: float = 2e-5) -> bool:
    """Equal to a part of the range; arrays that are not finite never are."""
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return False
    return bool(np.max(np.abs(x - y), initial=0.0) <= tolerance * max(1e-3, float(np.max(np.abs(y), initial=0.0))))
