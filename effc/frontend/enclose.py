"""What mixes tokens otherwise than by attention -> ops that decode: `running`, `recur`, else `window`.

A region becomes a function of rows [b,t,...]. What positions alone decide is computed in it again;
parameters are operands that stay the same. It is run on random numbers to see which rows its rows need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from effc.errors import EffcError
from effc.frontend.body import Region, build, front, unfront
from effc.frontend.graph import Graph
from effc.frontend.reach import Reach, reach_of
from effc.frontend.recurrence import raise_recurrence, recurs
from effc.frontend.regions import Flow, following, merged, regions, row_axes
from effc.ir.core import Attr, Loc, Op
from effc.ir.tokens import token_axes
from effc.ir.types import BYTES, Type, evaluate, product

RUNNING = {f"lax.cum{name}": name for name in ("sum", "prod", "max", "min", "logsumexp")}
"""Running totals, and what `running` calls them."""

PERMUTING = frozenset(f"lax.{name}" for name in ("sort", "gather", "scatter", "scatter_add", "top_k", "rev"))
"""Ops that may put tokens in another order, to be put back later: then both belong to one region."""


def enclose(graph: Graph, why: Mapping[str, str] | None = None) -> list[str]:
    """Put what mixes tokens into ops that decode, and the ops of `why` (reasons by output) too; returns notes."""
    flow = Flow(graph)
    plans = _Plans(flow, dict(why or {}))
    notes = Counter(note for plan in plans.settled() for note in plan.replace(graph))
    return [f"{note} (in {count} places)" if count > 1 else note for note, count in notes.items()]


@dataclass(frozen=True)
class _Plan:
    """One region and what becomes of it."""

    flow: Flow
    ops: set[int]
    reason: str
    region: Region | None = None  # None for ops with a rule of their own
    reach: Reach = field(default_factory=Reach)

    def replace(self, graph: Graph) -> list[str]:
        """Rewrite the graph; a note where every token costs the whole window."""
        first = self.flow.ops[min(self.ops)]
        if self.region is None:
            return raise_recurrence(graph, first) if first.kind == "lax.scan" else _running(graph, first)
        return self._window(graph, self.region)

    def _window(self, graph: Graph, region: Region) -> list[str]:
        operands = [*(front(graph, name) for name in region.rows), *region.fixed]
        types = [region.body.types()[name] for name in region.body.results]
        attrs: dict[str, Attr] = {"why": self.reason}
        if region.fixed:
            attrs["fixed"] = len(region.fixed)
        if self.reach.back is not None:
            attrs["lookback"] = self.reach.back
        loc = culprit(self.flow, self.ops).loc
        made = graph.add("window", operands, types, attrs=attrs, regions={"body": region.body}, loc=loc)
        for name, new in zip(region.results, made, strict=True):
            graph.become(name, unfront(graph, new, graph.type(name)))
        return [] if self.reach.back is not None else [self._note(loc, region)]

    def _note(self, loc: Loc | None, region: Region) -> str:
        kept = sum(_bytes(self.flow.types[name]) for name in region.rows)
        return (
            f"{loc}: {self.reason}; {len(region.body.ops)} ops recompute the whole window for every token: "
            f"cost grows with the length, {kept} bytes a token are kept"
        )


def culprit(flow: Flow, ops: set[int]) -> Op:
    """The op that a reader should look at: one that loses the tokens, else the first that mixes them."""
    mixing = [flow.ops[at] for at in sorted(ops & flow.mixing)] or [flow.ops[min(ops)]]
    lost = [op for op in mixing if not any(token_axes(v.type) for v in op.outputs)]
    return (lost or mixing)[0]


class _Plans:
    """Regions on their way: those that see later tokens grow until they do not."""

    def __init__(self, flow: Flow, why: dict[str, str]) -> None:
        self.flow, self.why = flow, why
        self.found = regions(flow, why)
        self.known: dict[tuple[str, int], Reach] = {}

    def settled(self) -> list[_Plan]:
        """What becomes of every region."""
        turn = 0
        while True:
            plans = [self._plan(ops) for ops in self.found]
            mixed = next((plan for plan in plans if not plan.reach.alone and plan.reach.causal), None)
            blind = next((plan for plan in plans if not plan.reach.causal), None)
            if mixed is not None:
                raise EffcError(_mixture(mixed))
            if blind is None:
                return plans
            if turn == TURNS:
                raise EffcError(_refusal(blind))
            self._grow(blind)
            turn += 1

    def _grow(self, plan: _Plan) -> None:
        """Join a region with the next that needs it, where tokens may only have been put in another order."""
        others = [ops for ops in self.found if ops != plan.ops]
        more = following(self.flow, plan.ops, others)
        if more is None or not any(self.flow.ops[at].kind in PERMUTING for at in plan.ops):
            raise EffcError(_refusal(plan))
        self.found = merged(self.flow, [plan.ops | more, *(ops for ops in others if ops != more)])

    def _plan(self, ops: set[int]) -> _Plan:
        first = self.flow.ops[min(ops)]
        if len(ops) == 1 and (_runs(self.flow, first) or recurs(self.flow, first)):
            return _Plan(self.flow, ops, "")
        region = build(self.flow, ops, set().union(*self.found))
        return _Plan(self.flow, ops, self._reason(ops), region, self._reach(region))

    def _reach(self, region: Region) -> Reach:
        key = (str(region.body), len(region.rows))
        if key not in self.known:
            params = {name: param.type for name, param in self.flow.graph.params.items()}
            self.known[key] = reach_of(region.body, len(region.rows), params)
        return self.known[key]

    def _reason(self, ops: set[int]) -> str:
        """Why tokens meet in a region."""
        made = [value.name for at in sorted(ops) for value in self.flow.ops[at].outputs]
        given = next((self.why[name] for name in made if name in self.why), "")
        return given or f"'{culprit(self.flow, ops).kind}' mixes tokens and has no incremental rule"


TURNS = 16
"""How often regions are joined before the program is taken to look at later tokens."""


def _mixture(plan: _Plan) -> str:
    op = culprit(plan.flow, plan.ops)
    types = " and ".join(str(plan.flow.types[i]) for i in op.inputs[:2])
    return f"{op.loc}: '{op.kind}' of {types} mixes the sequences of a batch, want a model of one sequence at a time"


def _refusal(plan: _Plan) -> str:
    op = culprit(plan.flow, plan.ops)
    types = " and ".join(str(plan.flow.types[i]) for i in op.inputs[:2])
    lost = not any(token_axes(value.type) for value in op.outputs)
    what = "takes all tokens and keeps none apart" if lost else "gives tokens what depends on later ones"
    return f"{op.loc}: not causal: '{op.kind}' of {types} {what}, want a model whose tokens see earlier ones only"


# -- running totals -------------------------------------------------------------------------------------
def _runs(flow: Flow, op: Op) -> bool:
    """Whether an op is a total of all tokens so far."""
    axes = row_axes(op.outputs[0].type) if op.kind in RUNNING else None
    return bool(axes) and axes[0] != axes[1] and op.attrs["axis"] == axes[1] and not op.attrs.get("reverse")  # type: ignore[index]


def _running(graph: Graph, op: Op) -> list[str]:
    rows = front(graph, op.inputs[0])
    (made,) = graph.add("running", [rows], graph.type(rows), attrs={"fn": RUNNING[op.kind]}, loc=op.loc)
    graph.become(op.out.name, unfront(graph, made, op.out.type))
    return []


def _bytes(type: Type) -> int:
    """Bytes of one token's row."""
    return evaluate(product(type.shape), {"b": 1, "t": 1}) * int(BYTES[str(type.dtype)] or 1)


__all__: Sequence[str] = ["enclose"]
