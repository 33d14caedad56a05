"""Flax -> IR: trace, import, raise, lift positions, roll, check."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from effc.errors import EffcError
from effc.frontend.enclose import enclose
from effc.frontend.graph import Graph
from effc.frontend.import_jaxpr import import_traces
from effc.frontend.naming import rename_values
from effc.frontend.positions import lift_positions, table_limit
from effc.frontend.roll import roll, spelled
from effc.frontend.simplify import simplify
from effc.frontend.source import Source, Weights
from effc.frontend.trace import Traced, trace
from effc.ir.core import Decode, Func, Module, Op, Param, Ref
from effc.ir.tokens import Dep, dependence
from effc.ir.types import evaluate
from effc.passes.raising.attention import raise_attentions
from effc.passes.raising.columns import raise_columns
from effc.passes.raising.heads import share_heads
from effc.passes.raising.linear import raise_embeddings, raise_linears
from effc.passes.raising.norm import raise_norms
from effc.passes.raising.rope import raise_ropes
from effc.passes.raising.unary import raise_activations
from effc.weights import Lazy, Store

DEFAULT_CONTEXT = 32768
"""Longest length where neither the checkpoint nor a table of positions sets one."""


LONGEST_TABLE = 4096
"""Length at which arrays that a program makes of the length are taken down: they limit the context."""


@dataclass(frozen=True)
class Lowered:
    """A model as IR: the module, its arrays, and what a reader should know about the lowering."""

    module: Module
    store: Store
    notes: list[str] = field(default_factory=list[str])
    traced: Traced | None = None


def lower(source: Source) -> Lowered:
    """The IR of a model's forward function, ready to decode; no array is read."""
    traced = trace(source.forward, source.spec)
    graph = import_traces(traced, min(source.context or LONGEST_TABLE, LONGEST_TABLE))
    simplify(graph)
    context = _context(source, graph)
    notes = raise_all(graph, context)
    func = graph.func("forward")
    module = rename_values(roll(_module(source, func, graph.params, context)))
    _refuse_blind(module)
    return Lowered(module, store_of(module, source.weights, graph.constants), notes, traced)


def raise_all(graph: Graph, context: int) -> list[str]:
    """Raise what can be; returns why an attention or a position was left, if one was."""
    raise_columns(graph)
    raise_embeddings(graph)
    raise_linears(graph)
    simplify(graph)
    raise_norms(graph)
    simplify(graph)
    notes = raise_attentions(graph, context)
    raise_activations(graph)
    simplify(graph)
    notes = [*enclose(graph), *notes]
    notes += enclose(graph, lift_positions(graph))
    simplify(graph)
    raise_embeddings(graph)
    simplify(graph)
    raise_ropes(graph, context)
    simplify(graph)
    share_heads(graph)
    simplify(graph)
    return list(dict.fromkeys(notes))


def _context(source: Source, graph: Graph) -> int:
    """The longest length that has a meaning."""
    limits = [n for n in (source.context, table_limit(graph)) if n]
    return min(limits) if limits else DEFAULT_CONTEXT


def _module(source: Source, func: Func, params: Mapping[str, Param], context: int) -> Module:
    used = {p for op in _with_regions(func) for p in op.params.values()}
    kept = {name: param for name, param in params.items() if name in used}
    vocab = func.result_types()[0].shape[-1]
    meta = {"source": source.name, **source.meta, "context": context, "vocab": evaluate(vocab, {})}
    name = re.sub(r"\W+", "_", source.name).strip("_").lower() or "model"
    name = name if not name[0].isdigit() else f"m{name}"
    return Module(name, meta, kept, {"forward": func}, Decode("greedy", {"forward": Ref("forward")}))


def _with_regions(func: Func) -> list[Op]:
    out: list[Op] = []
    for op in func.ops:
        out.append(op)
        for region in op.regions.values():
            out += _with_regions(region)
    return out


def _refuse_blind(module: Module) -> None:
    """A program whose logits do not depend on the tokens is a tracing mistake."""
    func = module.forward()
    deps = dependence(func.ops, [v.name for v in func.inputs])
    if deps.get(func.results[0], Dep.NOTHING) < Dep.TOKENS:
        raise EffcError("forward: the logits do not depend on the tokens, want a language model")


# -- arrays ---------------------------------------------------------------------------------------------
def store_of(module: Module, weights: Weights, constants: Mapping[str, np.ndarray]) -> Store:
    """The module's parameters, read from the checkpoint when asked for."""
    return Store({name: Lazy(param, _reader(param, weights, constants)) for name, param in module.params.items()})


def _reader(
    param: Param, weights: Weights, constants: Mapping[str, np.ndarray]
) -> Callable[[int], Mapping[str, np.ndarray]]:
    paths = spelled(param)

    def read(i: int) -> Mapping[str, np.ndarray]:
        array = _piece(paths[i], weights, constants)
        array = array if param.perm is None else np.transpose(array, param.perm)
        shape = tuple(evaluate(size, {}) for size in param.type.shape)
        return {"": np.ascontiguousarray(array).reshape(shape)}

    return read


def _piece(path: str, weights: Weights, constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """An array of the checkpoint, or one slice of it, `path[:,3]`."""
    if path in constants:
        return constants[path]
    match = re.fullmatch(r"(.*)\[((?::,)*)(\d+)\]", path)
    if match is None:
        return weights.read(path)
    axis = match[2].count(":")
    return np.take(_piece(match[1], weights, constants), int(match[3]), axis=axis)
