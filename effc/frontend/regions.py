"""The smallest pieces of a program that mix tokens otherwise than by attention, as sets of ops.

A value is a row a token where one axis is the tokens and one the sequences, or one axis is both. Ops that
mix tokens, and all ops that share a value which is no row a token with one of them, form a region; what
goes in and out of it is rows. A region holds every op on a path between two of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from effc.frontend.graph import Graph
from effc.ir.core import Op
from effc.ir.tokens import Dep, dependence, keeps_tokens_apart, token_axes
from effc.ir.types import Type, depends, evaluate, name_dim, product

B, T = name_dim("b"), name_dim("t")
BOTH = B * T

MOVES = frozenset({"lax.reshape", "lax.transpose", "lax.broadcast_in_dim", "lax.convert_element_type"})
"""Ops that compute nothing: what is kept of a token is what they start from, where that is smaller."""


def row_axes(type: Type) -> tuple[int, int] | None:
    """Axes of sequences and of tokens (one axis twice where it is both) of a row a token; None for others."""
    tokens, sequences = token_axes(type), [a for a, size in enumerate(type.shape) if depends(size, "b")]
    if len(tokens) != 1 or len(sequences) != 1:
        return None
    t, b = tokens[0], sequences[0]
    exact = type.shape[t] == BOTH if t == b else type.shape[t] == T and type.shape[b] == B
    return (b, t) if exact else None


def _by_sequence(type: Type) -> bool:
    return any(depends(size, "b") for size in type.shape)


class Flow:
    """The ops of a graph in order, who reads whom, and which values are rows."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ops = graph.order()
        self.types = graph.types
        self.maker = {value.name: at for at, op in enumerate(self.ops) for value in op.outputs}
        self.deps = dependence(self.ops, [value.name for value in graph.inputs])
        self.readers = self._readers()
        self.results = {graph.find(name) for name in graph.results}
        self.mixing = {at for at, op in enumerate(self.ops) if self.mixes(op)}
        self.rows = self._rows()

    def _readers(self) -> dict[str, list[int]]:
        out: dict[str, list[int]] = {}
        for at, op in enumerate(self.ops):
            for name in dict.fromkeys(op.inputs):
                out.setdefault(name, []).append(at)
        return out

    def tokens(self, name: str) -> bool:
        """Whether tokens decide the value."""
        return self.deps[name] == Dep.TOKENS

    def mixes(self, op: Op) -> bool:
        """Whether an op needs the values of other tokens, or sequences, and has no cache of its own."""
        if not self.tokens(op.outputs[0].name):
            return False
        return not keeps_tokens_apart(op, self.types) or not self._keeps_sequences(op)

    def _keeps_sequences(self, op: Op) -> bool:
        """Whether what has an axis of sequences still has one."""
        had = any(self.tokens(i) and _by_sequence(self.types[i]) for i in op.inputs)
        return not had or all(_by_sequence(value.type) for value in op.outputs)

    def _rows(self) -> set[str]:
        """Values that are a row a token; sequences and tokens on one axis may have been put in another order."""
        rows = {v.name for v in self.graph.inputs if row_axes(v.type)}
        for at, op in enumerate(self.ops):
            for value in op.outputs:
                axes = row_axes(value.type)
                moved = at in self.mixing or any(self.tokens(i) and i not in rows for i in op.inputs)
                if axes and not (axes[0] == axes[1] and moved):
                    rows.add(value.name)
        return rows

    def inside(self, name: str) -> bool:
        """Whether a value can only be read where it is made: tokens decide it, and it is no row a token."""
        return self.tokens(name) and name not in self.rows

    def inputs(self, region: set[int]) -> list[str]:
        """Rows that a region reads from outside."""
        names = dict.fromkeys(i for at in sorted(region) for i in self.ops[at].inputs if self.tokens(i))
        return [name for name in names if self.maker.get(name) not in region]

    def outputs(self, region: set[int]) -> list[str]:
        """Values of a region that others read."""
        made = [value.name for at in sorted(region) for value in self.ops[at].outputs]
        return [n for n in made if n in self.results or any(r not in region for r in self.readers.get(n, ()))]


def regions(flow: Flow, seeds: Iterable[str] = ()) -> list[set[int]]:
    """Disjoint regions in order, each closed; `seeds` are outputs of further ops that must be in one."""
    wanted = flow.mixing | {flow.maker[name] for name in seeds}
    found = [group for group in _groups(flow) if group & wanted]
    alone = wanted - {at for group in found for at in group}
    return merged(flow, [*found, *({at} for at in alone)])


def _groups(flow: Flow) -> list[set[int]]:
    """Ops joined by values that are no rows."""
    parent = list(range(len(flow.ops)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for name, at in flow.maker.items():
        if flow.inside(name):
            for reader in flow.readers.get(name, ()):
                parent[root(reader)] = root(at)
    groups: dict[int, set[int]] = {}
    for at in range(len(flow.ops)):
        groups.setdefault(root(at), set()).add(at)
    return [group for group in groups.values() if len(group) > 1]


def merged(flow: Flow, found: list[set[int]]) -> list[set[int]]:
    """Regions closed, those that come to share an op joined, until all are apart."""
    before = -1
    while before != len(found):
        before = len(found)
        found = _joined([closed(flow, region) for region in found])
    return sorted(found, key=min)


def _joined(found: list[set[int]]) -> list[set[int]]:
    out: list[set[int]] = []
    for region in found:
        apart = [other for other in out if not other & region]
        out = [*apart, region.union(*(other for other in out if other & region))]
    return out


def closed(flow: Flow, region: set[int]) -> set[int]:
    """The region with what lies on paths out of it and back, and with all that shares its inner values."""
    while True:
        grown = region | _between(flow, region)
        for name in [v.name for at in grown for v in flow.ops[at].outputs] + flow.inputs(grown):
            if flow.inside(name):
                grown = grown | {flow.maker[name]} | set(flow.readers.get(name, ()))
        if grown == region:
            return region
        region = grown


def _between(flow: Flow, region: set[int]) -> set[int]:
    """Ops outside that need the region and that the region needs."""
    first, last = min(region), max(region)
    after: set[int] = set()
    for at in range(first, last + 1):
        makers = {flow.maker.get(i, -1) for i in flow.ops[at].inputs}
        if at not in region and makers & (region | after):
            after.add(at)
    before: set[int] = set()
    for at in range(last, first - 1, -1):
        readers = {r for value in flow.ops[at].outputs for r in flow.readers.get(value.name, ())}
        if at not in region and readers & (region | before):
            before.add(at)
    return after & before


def chain(flow: Flow, name: str, taken: set[int]) -> list[int]:
    """Moves that make a row out of a smaller one, last first; empty where nothing smaller is at hand."""
    found: list[int] = []
    best, least = 0, _numbers(flow.types[name])
    at = flow.maker.get(name)
    while at is not None and at not in taken and flow.ops[at].kind in MOVES:
        (source,) = [i for i in flow.ops[at].inputs if flow.tokens(i)]
        if source not in flow.rows:
            break
        found.append(at)
        if _numbers(flow.types[source]) < least:
            best, least = len(found), _numbers(flow.types[source])
        at = flow.maker.get(source)
    return found[:best]


def _numbers(type: Type) -> int:
    """Numbers a token."""
    return evaluate(product(type.shape), {"b": 1, "t": 1})


def following(flow: Flow, region: set[int], others: list[set[int]]) -> set[int] | None:
    """The first of the other regions that needs this one."""
    after = set(region)
    for at in range(min(region), len(flow.ops)):
        if {flow.maker.get(i, -1) for i in flow.ops[at].inputs} & after:
            after.add(at)
    return next((other for other in sorted(others, key=min) if other & after), None)


__all__ = ["BOTH", "B", "Flow", "T", "chain", "closed", "following", "merged", "regions", "row_axes"]
