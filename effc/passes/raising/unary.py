"""Elementwise formulas of one value -> silu, gelu, softcap: told by their values on a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import literal
from effc.ir.core import Attr, Op
from effc.ir.ops import ELEMENTWISE
from effc.ir.types import Type
from effc.passes.raising.probe import close, region, run_region, signature

ANCHORS = {"lax.logistic", "lax.tanh", "lax.erf", "lax.erfc", "lax.exp"}
REACH = 12
"""How many ops an activation may be written in."""

GRID = np.concatenate([np.linspace(-9, 9, 37), [-60.0, 60.0, 1e-3, -1e-3]]).astype(np.float32)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _gelu_erf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return 0.5 * x * (1 + np.array([erf(v / np.sqrt(2)) for v in x]))


KNOWN: list[tuple[str, dict[str, Attr], Callable[[np.ndarray], np.ndarray]]] = [
    ("silu", {}, _silu),
    ("gelu", {}, _gelu_tanh),
    ("gelu", {"approx": "erf"}, _gelu_erf),
]

Found = tuple[str, dict[str, Attr]] | None


def raise_activations(graph: Graph) -> None:
    """Every activation written out in primitives becomes one op."""
    known: dict[str, Found] = {}
    users = graph.users()
    for op in graph.order():
        if op.kind in ANCHORS and op.outputs[0].name == graph.find(op.outputs[0].name):
            _raise(graph, op, users, known)


def _raise(graph: Graph, anchor: Op, users: dict[str, list[Op]], known: dict[str, Found]) -> None:
    for x in _sources(graph, anchor):
        for y in _results(graph, anchor, x, users):
            text = signature(graph, [y], [x])
            if text not in known:
                known[text] = _match(graph, x, y)
            found = known[text]
            if found is not None:
                kind, attrs = found
                graph.become(y, graph.one(kind, [x], graph.type(y), anchor.loc, **attrs))
                return


def _sources(graph: Graph, anchor: Op) -> Iterator[str]:
    """Values the anchor may be a formula of, nearest first."""
    queue, seen = list(anchor.inputs), set[str]()
    while queue and len(seen) < REACH:
        name = queue.pop(0)
        if name in seen or literal(graph, name) is not None:
            continue
        seen.add(name)
        if graph.type(name).shape == anchor.out.type.shape:
            yield name
        op = graph.op(name)
        if op is not None and op.kind in ELEMENTWISE:
            queue.extend(op.inputs)


def _results(graph: Graph, anchor: Op, x: str, users: dict[str, list[Op]]) -> Iterator[str]:
    """Values made of the anchor, x and literals alone, furthest first."""
    inside = {op.outputs[0].name for op in region(graph, [anchor.outputs[0].name], [x], limit=REACH)} | {x}
    if len(inside) > REACH or not _closed(graph, anchor.outputs[0].name, x):
        return
    found: list[str] = []
    queue = [anchor.outputs[0].name]
    while queue and len(found) < REACH:
        for user in users.get(queue.pop(0), ()):
            op = graph.op(user.outputs[0].name) or user
            name = op.outputs[0].name
            if name in found or op.kind not in ELEMENTWISE or graph.type(name).shape != graph.type(x).shape:
                continue
            if all(i == x or i in found or i in inside or _closed(graph, i, x) for i in op.inputs):
                found.append(name)
                queue.append(name)
    yield from reversed(found)


def _closed(graph: Graph, name: str, x: str) -> bool:
    """Whether `name` is an elementwise formula of x and literals."""
    ops = region(graph, [name], [x], limit=REACH + 6)
    if len(ops) > REACH + 6:
        return False
    plain = all(op.kind in ELEMENTWISE or op.kind == "const" for op in ops)
    made = {op.outputs[0].name for op in ops} | {graph.find(x)}
    return plain and all(i in made for op in ops for i in op.inputs)


def _match(graph: Graph, x: str, y: str) -> Found:
    """The activation whose values these are."""
    if Type(graph.type(x).dtype, ()) != Type(graph.type(y).dtype, ()):
        return None
    rank = len(graph.type(x).shape)
    feed = GRID.reshape((1,) * (rank - 1) + (-1,)) if rank else GRID
    with np.errstate(all="ignore"):
        (made,) = run_region(graph, [y], {x: feed})
        made = made.reshape(-1)
        for kind, attrs, function in KNOWN:
            if close(made, function(GRID.astype(np.float64)).astype(np.float32), 1e-6):
                return kind, attrs
    return _softcap(graph, x, y, made)


def _softcap(graph: Graph, x: str, y: str, made: np.ndarray) -> Found:
    caps = [op.attrs["value"] for op in region(graph, [y], [x]) if op.kind == "const"]
    for cap in caps:
        if isinstance(cap, float) and cap >= 1:
            wanted = (cap * np.tanh(GRID.astype(np.float64) / cap)).astype(np.float32)
            if close(made, wanted, 1e-6):
                return "softcap", {"cap": cap}
    return None
