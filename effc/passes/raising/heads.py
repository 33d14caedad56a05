"""Heads that a program repeats so that several query heads can read each: left as few as they are."""

from __future__ import annotations

import itertools

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import reshaped, transposed
from effc.ir.core import Op
from effc.ir.interpret import shape_of
from effc.ir.tokens import token_axes
from effc.ir.types import Type, divide, product
from effc.passes.raising.probe import run_region


def straight(graph: Graph, name: str) -> str:
    """The value that a chain of moves comes back to, if it does; found by numbering elements."""
    type = graph.type(name)
    for base in reversed(shape_chain(graph, name)):
        if graph.type(base) == type and base != name:
            ids = _numbered(type)
            if np.array_equal(run_region(graph, [name], {base: ids}, NUMBERED)[0], ids):
                return base
    return name


NUMBERED = {"b": 2, "t": 3}


def _numbered(type: Type) -> np.ndarray:
    """Elements 0, 1, 2 ... in the type's shape."""
    shape = shape_of(type, NUMBERED)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def _unrepeated(graph: Graph, name: str) -> str:
    """[b,t,g,d] before its heads were repeated to [b,t,h,d], each r times in a row; the same where they were not."""
    chain = shape_chain(graph, name)
    whole = product(graph.type(name).shape)
    for base in reversed(chain):
        size = product(graph.type(base).shape)
        ratio = divide(whole, size)
        if not isinstance(ratio, int) or ratio <= 1:
            continue
        found = _repeats(graph, name, base, ratio)
        if found is not None:
            return found
    return name


def fewest_heads(graph: Graph, k: str, v: str) -> tuple[str, str]:
    """Keys and values before their heads were repeated, where both were alike."""
    few = _unrepeated(graph, k), _unrepeated(graph, v)
    alike = graph.type(few[0]).shape[2] == graph.type(few[1]).shape[2]
    return few if alike else (k, v)


_MOVES = {"lax.reshape", "lax.transpose", "lax.broadcast_in_dim", "lax.gather", "lax.concatenate", "lax.tile"}


def shape_chain(graph: Graph, name: str) -> list[str]:
    """`name` and the values it is a rearrangement of."""
    chain = [graph.find(name)]
    op = graph.op(name)
    while op is not None and op.kind in _MOVES and op.inputs:
        live = list(dict.fromkeys(i for i in op.inputs if token_axes(graph.type(i))))
        if len(live) != 1:
            break
        chain.append(live[0])
        op = graph.op(live[0])
    return chain


def _repeats(graph: Graph, name: str, base: str, ratio: int) -> str | None:
    """`base` as [b,t,g,d] if `name` is that with every head repeated `ratio` times; found by numbering elements."""
    type = graph.type(base)
    b, t, h, d = graph.type(name).shape
    ids = _numbered(type)
    (spread,) = run_region(graph, [name], {base: ids}, NUMBERED)
    wanted = spread[:, :, ::ratio]
    if not isinstance(h, int) or h % ratio or not np.array_equal(np.repeat(wanted, ratio, axis=2), spread):
        return None
    if np.array_equal(ids.reshape(wanted.shape), wanted):
        return reshaped(graph, base, (b, t, h // ratio, d))
    for order in itertools.permutations(range(4)) if len(type.shape) == 4 else ():
        if tuple(type.shape[a] for a in order) == (b, t, h // ratio, d):
            if np.array_equal(ids.transpose(order), wanted):
                return transposed(graph, base, order)
    return None


def share_heads(graph: Graph) -> None:
    """Keys that were repeated, then turned, are turned and left for several query heads to read."""
    for op in graph.order():
        if op.kind == "attention":
            _share(graph, graph.op(op.outputs[0].name) or op)


def _share(graph: Graph, op: Op) -> None:
    q, k, v, *extra = op.inputs
    fewer = _unrepeated(graph, v)
    turned = graph.op(k)
    if turned is not None and turned.kind == "rope":
        few = _unrepeated(graph, turned.inputs[0])
        k = graph.add("rope", [few, *turned.inputs[1:]], graph.type(few), attrs=turned.attrs, loc=turned.loc)[0]
    if fewer == v or graph.type(k).shape[2] != graph.type(fewer).shape[2]:
        return
    same = {"params": op.params, "attrs": op.attrs, "regions": op.regions, "loc": op.loc}
    (made,) = graph.add("attention", [q, k, fewer, *extra], op.out.type, **same)  # type: ignore[arg-type]
    graph.become(op.outputs[0].name, made)
