"""A region as a function of rows [b,t,...] and fixed operands, its values numbered alike for equal regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from effc.frontend.graph import Graph
from effc.frontend.regions import Flow, chain, row_axes
from effc.frontend.simplify import reshaped, simplify, transposed
from effc.ir.core import Func, Op
from effc.ir.rewrite import rename
from effc.ir.tokens import Dep
from effc.ir.types import Type, depends, name_dim

B, T = name_dim("b"), name_dim("t")


@dataclass(frozen=True)
class Region:
    """What a region reads and gives, by the names outside; `body` is of the rows, then what is fixed."""

    rows: tuple[str, ...]
    fixed: tuple[str, ...]
    results: tuple[str, ...]
    body: Func


def build(flow: Flow, ops: set[int], taken: set[int]) -> Region:
    """The function that a region is; ops in `taken` belong to this or another region."""
    inside, rows, fixed = _needed(flow, ops, taken)
    tables = {flow.ops[at].params["table"]: "" for at in sorted(inside) if flow.ops[at].kind == "embed"}
    for name in tables:
        tables[name] = flow.graph.add("param", (), flow.graph.params[name].type, params={"value": name})[0]
    fixed += tables.values()
    graph = Graph(params=flow.graph.params, constants=flow.graph.constants)
    names: dict[str, str] = {}
    for name in rows:
        type = flow.types[name]
        names[name] = unfront(graph, graph.input(f"u{len(graph.inputs)}", fronted(type)), type)
    for name in fixed:
        names[name] = graph.input(f"u{len(graph.inputs)}", flow.types[name])
    for at in sorted(inside):
        op = flow.ops[at]
        if op.kind == "embed":
            names[op.out.name] = _looked_up(graph, names[tables[op.params["table"]]], names[op.inputs[0]], op.out.type)
        else:
            copy(graph, flow, at, names)
    results = flow.outputs(ops)
    graph.results = [front(graph, names[name]) for name in results]
    simplify(graph)
    body = graph.func("body")
    used = {i for op in body.ops for i in op.inputs} | set(body.results)
    kept = [name for name, value in zip([*rows, *fixed], body.inputs, strict=True) if value.name in used]
    inputs = tuple(value for value in body.inputs if value.name in used)
    body = numbered(replace(body, inputs=inputs, ops=tuple(_as_asked(body))))
    return Region(
        tuple(n for n in rows if n in kept), tuple(n for n in fixed if n in kept), tuple(results), body
    )  # fmt: skip


def copy(graph: Graph, flow: Flow, at: int, names: dict[str, str]) -> None:
    """One op of the flow in another graph, its operands under their names there."""
    op = flow.ops[at]
    made = graph.add(
        op.kind, [names[i] for i in op.inputs], [v.type for v in op.outputs],
        params=op.params, attrs=op.attrs, regions=op.regions, loc=op.loc,
    )  # fmt: skip
    names.update(zip((value.name for value in op.outputs), made, strict=True))


def _looked_up(graph: Graph, table: str, ids: str, type: Type) -> str:
    """Rows of a table that is an operand: parameters named in regions would keep layers apart."""
    shape = graph.type(ids).shape
    index = reshaped(graph, ids, (*shape, 1))
    return graph.one(
        "lax.gather", [table, index], type, offset=(len(shape),), collapsed=(0,), index_map=(0,),
        slice_sizes=(1, type.shape[-1]), mode="clip",
    )  # fmt: skip


def _needed(flow: Flow, ops: set[int], taken: set[int]) -> tuple[set[int], list[str], list[str]]:
    """Ops to run inside, with what positions decide; the rows and the fixed values they read."""
    inside, rows, fixed = set(ops), dict[str, None](), dict[str, None]()
    todo = [i for at in sorted(ops) for i in flow.ops[at].inputs]
    while todo:
        name = todo.pop(0)
        at = flow.maker.get(name)
        if at in inside:
            continue
        if flow.tokens(name) and at is not None and at not in taken and _chosen(flow, at, name):
            inside.add(at)
            todo += flow.ops[at].inputs
        elif flow.tokens(name):
            moves = chain(flow, name, taken)
            inside |= set(moves)
            start = next(i for i in flow.ops[moves[-1]].inputs if flow.tokens(i)) if moves else name
            rows[start] = None
            todo += [i for m in moves for i in flow.ops[m].inputs if not flow.tokens(i)]
        elif at is None or (flow.deps[name] == Dep.PARAMS and not _by_call(flow.types[name])):
            fixed[name] = None
        else:
            inside.add(at)
            todo += flow.ops[at].inputs
    return inside, list(rows), list(fixed)


def _chosen(flow: Flow, at: int, name: str) -> bool:
    """Whether a value is a choice (of experts, of what to hide) made of rows: then the region makes it itself,
    for not every number is one."""
    whole = str(flow.types[name].dtype)[0] in "iub" and str(flow.types[name].dtype) != "bf16"
    return whole and all(i in flow.rows or not flow.tokens(i) for i in flow.ops[at].inputs)


def _by_call(type: Type) -> bool:
    return any(depends(size, name) for size in type.shape for name in "bt")


# -- rows -----------------------------------------------------------------------------------------------
def fronted(type: Type) -> Type:
    """A row a token as [b,t,...]."""
    axes = row_axes(type)
    assert axes is not None
    rest = tuple(size for a, size in enumerate(type.shape) if a not in axes)
    return Type(type.dtype, (B, T, *rest))


def front(graph: Graph, name: str) -> str:
    """A row a token as [b,t,...]."""
    type = graph.type(name)
    moved = transposed(graph, name, _order(type))
    return reshaped(graph, moved, fronted(type).shape)


def unfront(graph: Graph, name: str, type: Type) -> str:
    """[b,t,...] as the type that `front` made it of."""
    order = _order(type)
    moved = reshaped(graph, name, tuple(type.shape[a] for a in order))
    return transposed(graph, moved, tuple(order.index(a) for a in range(len(order))))


def _order(type: Type) -> tuple[int, ...]:
    axes = row_axes(type)
    assert axes is not None
    first = dict.fromkeys(axes)
    return (*first, *(a for a in range(len(type.shape)) if a not in first))


def _as_asked(func: Func) -> list[Op]:
    """Ops in the order in which results ask for them, whatever was made first."""
    makers = {value.name: op for op in func.ops for value in op.outputs}
    done: dict[str, Op] = {}
    stack = [(name, False) for name in reversed(func.results)]
    while stack:
        name, ready = stack.pop()
        op = makers.get(name)
        if op is None or op.outputs[0].name in done:
            continue
        if ready:
            done[op.outputs[0].name] = op
            continue
        stack.append((name, True))
        stack += [(i, False) for i in reversed(op.inputs)]
    return list(done.values())


# -- names ----------------------------------------------------------------------------------------------
def numbered(func: Func, depth: int = 0) -> Func:
    """Values called u0, u1 ... in order (v0 ... in regions inside), places left out: equal functions are equal."""
    names = [v.name for v in func.inputs] + [v.name for op in func.ops for v in op.outputs]
    new: Mapping[str, str] = {name: f"{'uvw'[min(depth, 2)]}{i}" for i, name in enumerate(names)}
    func = rename(func, new)
    ops = [
        replace(op, loc=None, regions={role: numbered(region, depth + 1) for role, region in op.regions.items()})
        for op in func.ops
    ]
    return replace(func, ops=tuple(ops))
