"""rsqrt of a mean square -> norm, with the scale and bias that follow it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import literal
from effc.ir.core import Attr, Op, Param
from effc.ir.interpret import shape_of
from effc.ir.ops import ELEMENTWISE
from effc.ir.types import Type, evaluate, product
from effc.passes.raising.linear import view
from effc.passes.raising.probe import SHAPING, close, peel, region, run_region, signature
from effc.runtime import layers

ANCHORS = {"lax.rsqrt", "lax.sqrt", "lax.pow"}
_INNER = ELEMENTWISE | SHAPING | {"lax.reduce_sum", "const"}
_SQUARES = {"lax.square", "lax.integer_pow", "lax.mul", "lax.abs"}


@dataclass(frozen=True)
class Fit:
    """A norm that a region computes, times a number: which leaf is the scale and which the bias."""

    attrs: dict[str, Attr]
    scale: int | None
    bias: int | None
    factor: float = 1.0


def raise_norms(graph: Graph) -> None:
    """Every normalisation over the last axis becomes a `norm`."""
    known: dict[str, Fit | None] = {}
    while _raise_each(graph, known):  # several norms of one value share what they divide by
        pass


def _raise_each(graph: Graph, known: dict[str, Fit | None]) -> bool:
    """One norm for every root of a mean square; whether there was any."""
    readers = Readers(graph)
    found = [
        _raise(graph, op.outputs[0].name, readers, known)
        for op in readers.order
        if op.kind in ANCHORS and op.outputs[0].name == graph.find(op.outputs[0].name)
    ]
    return any(found)


MOST = 60
"""Ops that are looked at for one norm."""


class Readers:
    """Who reads each value, by place in the program."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.order = graph, graph.order()
        self.places: dict[str, list[int]] = {}
        for at, op in enumerate(self.order):
            for name in dict.fromkeys(op.inputs):
                self.places.setdefault(name, []).append(at)

    def made_of(self, names: Iterable[str], wanted: Callable[[Op], bool]) -> Iterator[Op]:
        """Ops that read these values, and what wanted ones make, in the order of the program."""
        todo = [at for name in names for at in self.places.get(name, ())]
        heapq.heapify(todo)
        last = -1
        for _ in range(MOST):
            at = heapq.heappop(todo) if todo else len(self.order)
            if at < len(self.order) and at != last:
                op = self.graph.op(self.order[at].outputs[0].name) or self.order[at]
                if wanted(op):
                    yield op
                    for later in self.places.get(op.outputs[0].name, ()):
                        heapq.heappush(todo, later)
            last = at

    def follow(self, old: str, new: str) -> None:
        """Who reads `old` reads `new`."""
        self.places[new] = self.places.get(old, [])


def _raise(graph: Graph, anchor: str, readers: Readers, known: dict[str, Fit | None]) -> bool:
    """Replace the longest formula around the anchor that is a norm; whether there is one."""
    x = _source(graph, anchor)
    if x is None:
        return False
    for y, leaves in reversed(list(_candidates(graph, anchor, x, readers))):
        fit = _fit(graph, x, y, leaves, known)
        if fit is not None:
            done = _replace(graph, x, y, leaves, fit)
            readers.follow(y, graph.find(y))
            return done
    return False


def _source(graph: Graph, anchor: str) -> str | None:
    """The value whose mean square the anchor is made of."""
    found: set[str] = set()
    for op in _per_row(graph, anchor):
        axes, shape = op.attrs["axes"], graph.type(op.inputs[0]).shape
        if axes != (len(shape) - 1,):
            return None
        found.add(_unsquared(graph, op.inputs[0]))
    return found.pop() if len(found) == 1 else None


def _per_row(graph: Graph, anchor: str) -> Iterator[Op]:
    """Sums over the last axis that the anchor is computed from, one number a row in between."""
    stack, seen = [anchor], set[str]()
    while stack and len(seen) < 40:
        op = graph.op(stack.pop())
        if op is None or op.outputs[0].name in seen:
            continue
        seen.add(op.outputs[0].name)
        if op.kind == "lax.reduce_sum":
            yield op
        elif op.kind in _INNER:
            stack.extend(op.inputs)


def _unsquared(graph: Graph, name: str) -> str:
    """x behind x, x^2, |x|^2 or (x - mean)^2."""
    while True:
        name = peel(graph, name, {"lax.convert_element_type"})
        op = graph.op(name)
        if (op is not None and op.kind in _SQUARES and len(set(op.inputs)) == 1) or (
            op is not None and op.kind == "lax.sub" and _is_mean_of(graph, op.inputs[1], op.inputs[0])
        ):
            name = op.inputs[0]
        else:
            return graph.find(name)


def _is_mean_of(graph: Graph, mean: str, x: str) -> bool:
    op = graph.op(peel(graph, mean, SHAPING | {"lax.div", "lax.mul"}))
    return (
        op is not None
        and op.kind == "lax.reduce_sum"
        and peel(graph, op.inputs[0], SHAPING) == peel(graph, x, {"lax.convert_element_type"})
    )


def _candidates(graph: Graph, anchor: str, x: str, readers: Readers) -> Iterator[tuple[str, list[str]]]:
    """Values in the shape of x made of the anchor, x and parameters, with those parameters' values."""
    inside = {op.outputs[0].name for op in region(graph, [anchor], [x])} | {x}
    leaves: list[str] = []
    tail = {anchor}
    shape = graph.type(x).shape

    def beside(op: Op) -> list[str]:
        return [i for i in op.inputs if i not in inside and literal(graph, i) is None]

    def own(op: Op) -> bool:
        plain = op.outputs[0].name not in inside and op.kind in ELEMENTWISE | SHAPING
        return plain and all(leaf(graph, i) is not None for i in beside(op))

    for op in readers.made_of([name for name in sorted(inside) if literal(graph, name) is None], own):
        name = op.outputs[0].name
        leaves = list(dict.fromkeys([*leaves, *beside(op)]))
        inside.add(name)
        if tail.intersection(op.inputs):
            tail.add(name)
            if graph.type(name).shape == shape:
                used = [v for v in leaves if _reads(graph, name, v, x)]
                yield name, used


def _reads(graph: Graph, root: str, leaf_name: str, x: str) -> bool:
    return any(leaf_name in op.inputs for op in region(graph, [root], [x, leaf_name]))


def leaf(graph: Graph, name: str) -> tuple[Param, float] | None:
    """A parameter of one axis behind reshapes, and the literal added to it."""
    op = graph.op(peel(graph, name, SHAPING))
    offset = 0.0
    if op is not None and op.kind == "lax.add":
        for side in (0, 1):
            value = literal(graph, op.inputs[side])
            if value is not None:
                offset, op = float(value), graph.op(peel(graph, op.inputs[1 - side], SHAPING))
                break
    if op is None or op.kind != "param":
        return None
    param = graph.params[op.params["value"]]
    wide = [s for s in param.type.shape if s != 1]
    return (param, offset) if len(wide) <= 1 else None


def _fit(graph: Graph, x: str, y: str, leaves: list[str], known: dict[str, Fit | None]) -> Fit | None:
    offsets = [leaf(graph, v) for v in leaves]
    text = signature(graph, [y], [x, *leaves]) + str([o[1] for o in offsets if o])
    if text not in known:
        known[text] = _search(graph, x, y, leaves)
    return known[text]


def _search(graph: Graph, x: str, y: str, leaves: list[str]) -> Fit | None:
    """The norm that agrees with the region on numbers, at sizes where eps matters and where it does not."""
    if len(leaves) > 2:
        return None
    epsilons = _epsilons(graph, x, y)
    made = _samples(graph, x, y, leaves)
    if made is None:
        return None
    inputs, vectors, outputs = made
    tolerance = 2e-5 if graph.type(y).dtype == "f32" else 2e-2
    for kind, eps, (scale, bias) in itertools.product(("rms", "layer"), epsilons, _roles(len(leaves))):
        args = [jnp.asarray(vectors[i]) if i is not None else None for i in (scale, bias)]
        wanted = [np.asarray(layers.norm(jnp.asarray(v), *args, kind=kind, eps=eps)) for v in inputs]
        factor = _factor(outputs[-1], wanted[-1]) if bias is None and tolerance < 1e-2 else 1.0
        if all(close(a, b * factor, tolerance) for a, b in zip(outputs, wanted, strict=True)):
            return Fit({"kind": kind, "eps": eps}, scale, bias, factor)
    return None


def _factor(made: np.ndarray, norm: np.ndarray) -> float:
    """How many times the norm a result is, as x / |x| is the norm over the root of the width."""
    ratio = float((made * norm).sum() / (norm * norm).sum()) if np.isfinite(made).all() else 1.0
    return ratio if abs(ratio - 1) > 1e-5 and abs(ratio) > 1e-3 else 1.0


def _roles(count: int) -> Iterable[tuple[int | None, int | None]]:
    return {0: [(None, None)], 1: [(0, None), (None, 0)], 2: [(0, 1), (1, 0)]}[count]


def _epsilons(graph: Graph, x: str, y: str) -> list[float]:
    """Literals inside the region: one of them is eps."""
    found = [op.attrs["value"] for op in region(graph, [y], [x]) if op.kind == "const"]
    small = [float(v) for v in found if isinstance(v, float) and 0 < v < 0.01]
    width = evaluate(graph.type(x).shape[-1], {})
    return list(dict.fromkeys([*small, 0.0, *(v / width for v in small)]))  # of a mean, or of a sum


def _samples(
    graph: Graph, x: str, y: str, leaves: list[str]
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]] | None:
    """Inputs of three magnitudes, a vector for each leaf, and what the region makes of them."""
    rng = np.random.default_rng(0)
    type = graph.type(x)
    sizes = {"b": 2, "t": 3}
    shape = shape_of(type, sizes)
    width = shape[-1]
    vectors = [rng.normal(1, 0.3, width).astype(np.float32) for _ in leaves]
    inputs = [(rng.normal(0.3, 1, shape) * size).astype(np.float32) for size in (1.0, 1e-3, 30.0)]
    feeds = {}
    for name, vector in zip(leaves, vectors, strict=True):
        held = shape_of(graph.type(name), sizes)
        if int(np.prod(held)) % width or held[-1] not in (1, width):
            return None
        feeds[name] = np.broadcast_to(vector, held) if held[-1] == width else None
        if feeds[name] is None:
            return None
    outputs = [run_region(graph, [y], {x: v, **feeds}, sizes)[0] for v in inputs]
    return inputs, vectors, outputs


def _replace(graph: Graph, x: str, y: str, leaves: list[str], fit: Fit) -> bool:
    params: dict[str, str] = {}
    attrs = dict(fit.attrs)
    for role, at in (("scale", fit.scale), ("bias", fit.bias)):
        if at is None:
            continue
        found = leaf(graph, leaves[at])
        assert found is not None
        param, offset = found
        if offset and role == "bias":
            return False
        params[role] = view(graph, param, (product(param.type.shape),), None)
        if offset:
            attrs["offset"] = offset
    op = graph.op(y)
    type = Type(graph.type(y).dtype, graph.type(y).shape)
    loc = op.loc if op else None
    (made,) = graph.add("norm", [x], type, params=params, attrs=attrs, loc=loc)
    if fit.factor != 1.0:
        factor = graph.one("const", (), Type(type.dtype, ()), loc, value=float(np.float32(fit.factor)))
        made = graph.one("lax.mul", [made, factor], type, loc)
    graph.become(y, made)
    return True
