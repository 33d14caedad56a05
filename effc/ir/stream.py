"""Run a whole module, weights read layer by layer: a model larger than memory can be checked and evaluated.

`run` takes one batch of tokens; `run_chunks` and `run_groups` take many, and read each layer's
weights once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effc.errors import EffcError
from effc.ir import routed
from effc.ir.core import Attr, Func, Module, Op, Param, Ref
from effc.ir.interpret import Context, Weight, apply, evaluate_func
from effc.ir.interpret_early import Calls, Tokens, leave_early
from effc.ir.ops import Along, array_index, attribute, spec_of
from effc.ir.rewrite import inline_calls
from effc.ir.types import Quant, evaluate
from effc.runtime import primitives
from effc.runtime.forms import held
from effc.runtime.qarray import QArray


class Reads(Protocol):
    """One parameter of a weight store."""

    @property
    def param(self) -> Param: ...
    @property
    def read(self) -> Callable[[int], Mapping[str, np.ndarray]]: ...


def weight(lazy: Reads, i: int) -> Weight:
    """The i-th array of a parameter, on the device."""
    arrays, dtype = lazy.read(i), lazy.param.type.dtype
    if not isinstance(dtype, Quant):
        return jnp.asarray(arrays[""], primitives.dtype_of(dtype))
    width = evaluate(lazy.param.type.shape[-1], {})
    zeros = jnp.asarray(arrays["zeros"]) if "zeros" in arrays else None
    codes, scales = jnp.asarray(held(arrays["codes"], width, dtype.bits)), jnp.asarray(arrays["scales"])
    return QArray(codes, scales, zeros, dtype.bits, dtype.group, dtype.axis, width, dtype.form)


def run(module: Module, store: Mapping[str, Reads], tokens: Array) -> Array:
    """Logits [b,t,V] of the forward function, from the start of the sequences."""
    (pieces,) = run_chunks(module, store, [tokens], rows=tokens.shape[1])
    return pieces.logits


@dataclass(frozen=True)
class Group:
    """Chunks of tokens i32[b,t]: each by itself, or, where `capacity` says how many tokens a cache holds,
    each following the one before in the same sequences, the first after `lengths` i32[b] (default 0)."""

    chunks: Sequence[Array]
    capacity: int = 0
    lengths: Array | None = None


@dataclass(frozen=True)
class Piece:
    """Logits of some tokens of a chunk: logits[b,n,V] are of its tokens start..start+n-1."""

    chunk: int
    start: int
    logits: Array
    group: int = 0


@dataclass(frozen=True)
class Watch:
    """Values of functions that are to be looked at, and who looks: called with the function's name, the number
    of the layer, and the values by name, a chunk at a time."""

    names: Mapping[str, Sequence[str]]
    see: Callable[[str, int, Mapping[str, Array]], None]


@dataclass
class _State:
    """One chunk on its way through the program."""

    group: int
    chunk: int
    context: Context
    values: dict[str, Array] = field(default_factory=dict[str, Array])
    watch: Watch | None = None


def run_chunks(
    module: Module, store: Mapping[str, Reads], chunks: Sequence[Array], *, rows: int = 128,
    lengths: Array | None = None, capacity: int = 0,
) -> Iterator[Piece]:  # fmt: skip
    """Logits of one group of chunks, `rows` tokens at a time, in order."""
    return run_groups(module, store, [Group(chunks, capacity, lengths)], rows=rows)


def run_groups(
    module: Module, store: Mapping[str, Reads], groups: Sequence[Group], *, rows: int = 128
) -> Iterator[Piece]:
    """Logits of every chunk of every group in order; all weights are read once.

    Peak memory is one layer's weights, the chunks' activations and one slice of logits.
    """
    func = inline_calls(module, module.forward())
    states = [state for at, group in enumerate(groups) for state in _states(func, at, group)]
    cut = _tail(func)
    last = _last_use(func)
    for at, op in enumerate(func.ops[:cut]):
        _step(module, store, op, states)
        for state in states:
            for name in [n for n in state.values if last.get(n, -1) <= at and n not in func.results]:
                del state.values[name]
    yield from _finish(func, cut, store, states, rows)


def look(module: Module, store: Mapping[str, Reads], chunks: Sequence[Array], watch: Watch) -> None:
    """Run chunks through the program as far as there is something to look at; weights are read once."""
    func = inline_calls(module, module.forward())
    mine = watch.names.get(func.name, ())
    states = [replace(state, watch=watch) for state in _states(func, 0, Group(chunks))]
    last = _last_use(func)
    for at, op in enumerate(_until(func, watch)):
        _step(module, store, op, states)
        for state in states:
            seen = {value.name: state.values[value.name] for value in op.outputs if value.name in mine}
            if seen:
                watch.see(func.name, 0, seen)
            for name in [n for n in state.values if last.get(n, -1) <= at]:
                del state.values[name]


def _until(func: Func, watch: Watch) -> tuple[Op, ...]:
    """Ops up to the last that defines or runs what is looked at."""
    wanted = watch.names.get(func.name, ())
    ends = [at + 1 for at, op in enumerate(func.ops) if op.kind == "repeat" or {v.name for v in op.outputs} & {*wanted}]
    return func.ops[: max(ends, default=0)]


def _states(func: Func, index: int, group: Group) -> Iterator[_State]:
    cache: dict[str, tuple[Array, ...]] | None = {} if group.capacity else None
    done = jnp.zeros(group.chunks[0].shape[0], jnp.int32) if group.lengths is None else group.lengths
    for chunk, tokens in enumerate(group.chunks):
        b, t = tokens.shape
        start = done if group.capacity else jnp.zeros(b, jnp.int32)
        positions = start[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        context = Context({"b": b, "t": t}, positions, cache, group.capacity)
        yield _State(index, chunk, context, {func.inputs[0].name: jnp.asarray(tokens, jnp.int32)})
        done = done + t


def _tail(func: Func) -> int:
    """Where the ops begin that take every token by itself: after the last that does not."""
    for at in range(len(func.ops) - 1, -1, -1):
        if not _local(func.ops[at]):
            return at + 1
    return 0


def _local(op: Op) -> bool:
    """Whether rows of the op's results can be computed apart: from tables of parameters, along the last axis."""
    spec = spec_of(op.kind)
    plain = op.kind in {"embed", "linear", "norm", "silu", "gelu", "softcap", "const", "param"}
    return plain or (spec is not None and spec.along is Along.LOCAL and spec.kind == "lax" and not op.attrs)


def _last_use(func: Func) -> dict[str, int]:
    return {name: at for at, op in enumerate(func.ops) for name in op.inputs}


def _step(
    module: Module, store: Mapping[str, Reads], op: Op, states: Sequence[_State], layer: int = 0, order: Attr | Ref = ()
) -> None:
    """One op on every chunk; stacked parameters give the array of this layer."""
    if op.kind == "repeat":
        _repeat(module, store, op, states)
        return
    if op.kind == "recurse":
        _recurse(module, store, op, states)
        return
    if op.kind == "early":
        _early(module, store, op, states)
        return
    held = _held(module, store, [op], layer, order)
    weights = {role: held[name] for role, name in op.params.items()}
    run_op = apply if op.regions or op.kind in KEEPING else _by_itself(op)
    for state in states:
        state.context.weights = held
        results = run_op(op, [state.values[name] for name in op.inputs], weights, state.context)
        state.values.update(zip((value.name for value in op.outputs), results, strict=True))
        state.context.weights = {}


KEEPING = frozenset({"attention", "running", "keep"})
"""Ops without regions that keep something of every token."""


def params_of(ops: Sequence[Op]) -> list[str]:
    """Parameters that ops read, regions included."""
    inner = [p for op in ops for region in op.regions.values() for p in params_of(region.ops)]
    return list(dict.fromkeys([*(p for op in ops for p in op.params.values()), *inner]))


def _by_itself(op: Op) -> Callable[..., Sequence[Array]]:
    """An op that keeps nothing, compiled: op by op inside it would be many programs."""

    def call(sizes: tuple[tuple[str, int], ...], positions: Array, operands: Any, weights: Any) -> Any:
        return list(apply(op, operands, weights, Context(dict(sizes), positions)))

    jitted = jax.jit(call, static_argnums=0)

    def step(op: Op, operands: Sequence[Array], weights: Mapping[str, Weight], context: Context) -> Sequence[Array]:
        return jitted(tuple(sorted(context.sizes.items())), context.positions, list(operands), dict(weights))

    return step


def _held(
    module: Module, store: Mapping[str, Reads], ops: Sequence[Op], layer: int, order: Attr | Ref, stacked: bool = False
) -> dict[str, Weight]:
    """What ops read for a layer, on the device; of the stacked parameters alone where asked."""
    stacks = {name: module.params[name].stack for name in params_of(ops)}
    wanted = {name: stack for name, stack in stacks.items() if stack or not stacked}
    return {n: weight(store[n], array_index(order, stack, layer) if stack else 0) for n, stack in wanted.items()}


def _repeat(module: Module, store: Mapping[str, Reads], op: Op, states: Sequence[_State]) -> None:
    ref, times, start, carry = (attribute(op, name) for name in ("block", "times", "start", "carry"))
    assert isinstance(ref, Ref) and isinstance(times, int) and isinstance(start, int) and isinstance(carry, int)
    block = module.funcs[ref.name]
    block = replace(block, ops=inline_calls(module, block).ops)
    once = _block(module, store, block, attribute(op, "order"), states[0].watch)
    carried = [[state.values[name] for name in op.inputs] for state in states]
    for layer in range(start, start + times):
        for operands, results in zip(carried, once(states, carried, layer), strict=True):
            operands[:carry] = results
        jax.block_until_ready(carried)
    for state, operands in zip(states, carried, strict=True):
        state.values.update(zip((value.name for value in op.outputs), operands[:carry], strict=True))


def _early(module: Module, store: Mapping[str, Reads], op: Op, states: Sequence[_State]) -> None:
    """Every layer on every chunk; tokens that have left keep their state, which is what they are defined by."""
    tokens = [Tokens(state.values[op.inputs[0]], op.attrs.get("state") == "deferred") for state in states]
    rest = [[state.values[name] for name in op.inputs[1:]] for state in states]

    def call(name: str) -> Callable[[Sequence[Sequence[Array]], int], list[Sequence[Array]]]:
        target = op.attrs[name]
        assert isinstance(target, Ref)
        func = module.funcs[target.name]
        layers = name in ("block", "after")
        order = attribute(op, "order") if layers else ()
        once = _block(module, store, replace(func, ops=inline_calls(module, func).ops), order, None)
        more = rest if layers else [[] for _ in states]
        return lambda xs, i: [list(r) for r in once(states, [[*x, *others] for x, others in zip(xs, more)], i)]

    head, after = call("head"), call("after") if "after" in op.attrs else None
    say = call("say") if "say" in op.attrs else head
    leave_early(op, tokens, Calls(call("block"), call("exit"), head, say, after))
    for state, mine in zip(states, tokens, strict=True):
        assert mine.shown is not None
        state.values.update(zip((value.name for value in op.outputs), (mine.shown, mine.layers), strict=True))


def _recurse(module: Module, store: Mapping[str, Reads], op: Op, states: Sequence[_State]) -> None:
    """All depths on whole sequences: what decoding makes of it is held against this."""
    ref, span, order = op.attrs["block"], op.attrs["span"], attribute(op, "order")
    assert isinstance(ref, Ref) and isinstance(span, int)
    if any(state.context.cache is not None for state in states):
        raise EffcError(f"@{ref.name}: the interpreter runs `recurse` on whole sequences, want no cache")
    block, shared = module.funcs[ref.name], attribute(op, "kv") == "shared"
    block, start = replace(block, ops=inline_calls(module, block).ops), attribute(op, "start")
    assert isinstance(start, int)
    router = weight(store[op.params["router"]], 0)
    router = router.dequantize() if isinstance(router, QArray) else router
    call = jax.jit(partial(_routed_layer, block), static_argnums=0)

    def layer(chunks: list[routed.Tokens], number: int, on: list[Array] | None) -> list[Array]:
        held, i, out = _held(module, store, block.ops, number, order), (number - start) % span, list[Array]()
        for at, (state, tokens) in enumerate(zip(states, chunks, strict=True)):
            sizes, borrowed = tuple(sorted(state.context.sizes.items())), tokens.first.get(i) if shared else None
            x, kept = call(sizes, tokens.positions, held, tokens.operands, None if on is None else on[at], borrowed)
            tokens.first.setdefault(i, kept if shared else {})
            out.append(x)
        return out

    chunks = [routed.Tokens([state.values[name] for name in op.inputs], state.context.positions) for state in states]
    routed.recurse(op, router, chunks, layer)
    for state, tokens in zip(states, chunks, strict=True):
        state.values[op.out.name] = tokens.x


def _routed_layer(
    block: Func,
    sizes: tuple[tuple[str, int], ...],
    positions: Array,
    weights: Any,
    operands: Any,
    on: Any,
    borrowed: Any,
) -> tuple[Array, routed.Keys]:
    """A layer of which some tokens are on: states after it, and the keys and values it made."""
    how = routed.Routed(on, borrowed)
    (x,) = evaluate_func(block, operands, weights, Context(dict(sizes), positions, routed=how))
    return x, how.kept


Once = Callable[[Sequence[_State], Sequence[list[Array]], int], Iterable[Sequence[Array]]]
"""A block run on every chunk with the arrays of one layer: results a chunk, one after the other."""


def _block(module: Module, store: Mapping[str, Reads], block: Func, order: Attr | Ref, watch: Watch | None) -> Once:
    nested = any(op.kind == "repeat" for op in block.ops)
    looked = list(watch.names.get(block.name, ())) if watch else []
    wide = replace(block, results=(*block.results, *looked))
    once = (_nested if nested else _flat)(module, store, wide, order)
    if watch is None or not looked:
        return once

    def watched(states: Sequence[_State], operands: Sequence[list[Array]], layer: int) -> Iterator[Sequence[Array]]:
        for results in once(states, operands, layer):
            watch.see(block.name, layer, dict(zip(looked, results[len(block.results) :], strict=True)))
            yield results[: len(block.results)]

    return watched


def _flat(module: Module, store: Mapping[str, Reads], block: Func, order: Attr | Ref) -> Once:
    """Compiled as a whole; parameters that all layers share are read once."""
    names = params_of(block.ops)
    shared = {name: weight(store[name], 0) for name in names if not module.params[name].stack}
    compiled = _compiled(block)

    def once(states: Sequence[_State], operands: Sequence[list[Array]], layer: int) -> Iterator[Sequence[Array]]:
        weights = shared | _held(module, store, block.ops, layer, order, stacked=True)
        for state, mine in zip(states, operands, strict=True):
            yield compiled(state.context, weights, mine, layer)
        for state in states:
            _forget(state.context, f"{layer}/")

    return once


def _nested(module: Module, store: Mapping[str, Reads], block: Func, order: Attr | Ref) -> Once:
    """Op by op, for a block that repeats others."""

    def once(states: Sequence[_State], operands: Sequence[list[Array]], layer: int) -> Sequence[Sequence[Array]]:
        inner = [replace(state, values={}) for state in states]
        for state, mine in zip(inner, operands, strict=True):
            state.values.update(zip((value.name for value in block.inputs), mine, strict=True))
        for op in block.ops:
            _step(module, store, op, inner, layer, order)
        _forget_all(inner)
        return [[state.values[name] for name in block.results] for state in inner]

    return once


def _forget_all(states: Sequence[_State]) -> None:
    """Keys that the ops of a run kept: its next run begins with none."""
    for state in states:
        _forget(state.context, "/")


def _forget(context: Context, prefix: str) -> None:
    """A layer is done with for all chunks: drop its keys."""
    if context.cache is not None:
        for key in [k for k in context.cache if k.startswith(prefix)]:
            del context.cache[key]


def _compiled(block: Func) -> Callable[..., list[Array]]:
    """The block as a compiled function, one program a shape of chunk, the cache passed in and out."""

    def call(
        sizes: tuple[tuple[str, int], ...],
        capacity: int,
        positions: Array,
        cache: Any,
        weights: Any,
        operands: Any,
    ) -> Any:
        context = Context(dict(sizes), positions, cache, capacity)
        return evaluate_func(block, operands, weights, context), context.cache

    jitted = jax.jit(call, static_argnums=(0, 1))

    def step(context: Context, weights: Mapping[str, Weight], operands: list[Array], i: int) -> list[Array]:
        cache = None if context.cache is None else {
            k.split("/", 1)[1]: v for k, v in context.cache.items() if k.startswith(f"{i}/")
        }  # fmt: skip
        inner = None if cache is None else {f"/{k}": v for k, v in cache.items()}
        sizes = tuple(sorted(context.sizes.items()))
        out, after = jitted(sizes, context.capacity, context.positions, inner, dict(weights), operands)
        if context.cache is not None:
            context.cache.update({f"{i}{k}": v for k, v in after.items()})
        return out

    return step


def _finish(func: Func, cut: int, store: Mapping[str, Reads], states: Sequence[_State], rows: int) -> Iterator[Piece]:
    """The ops after `cut` on `rows` tokens at a time."""
    tail = func.ops[cut:]
    weights = {name: weight(store[name], 0) for op in tail for name in op.params.values()}
    wanted = {name for op in tail for name in op.inputs} | set(func.results)
    compiled = jax.jit(_tail_call(tail, func.results), static_argnums=0)
    for state in states:
        values = {name: x for name, x in state.values.items() if name in wanted}
        count = state.context.sizes["t"]
        step = rows if all(_by_token(op) for op in tail) else count
        for start in range(0, count, step):
            piece = {name: _rows_of(x, start, step, count) for name, x in values.items()}
            sizes = (("b", state.context.sizes["b"]), ("t", min(step, count - start)))
            yield Piece(state.chunk, start, compiled(sizes, piece, weights), state.group)


def _by_token(op: Op) -> bool:
    return op.kind not in {"const", "param"} or not op.outputs[0].type.shape or op.kind == "param"


def _rows_of(x: Array, start: int, step: int, count: int) -> Array:
    return x[:, start : start + step] if x.ndim > 1 and x.shape[1] == count else x


def _tail_call(tail: Sequence[Op], results: Sequence[str]) -> Callable[..., Array]:
    def call(sizes: tuple[tuple[str, int], ...], values: dict[str, Array], weights: Mapping[str, Weight]) -> Array:
        context = Context(dict(sizes), jnp.zeros((1, 1), jnp.int32))
        values = dict(values)
        for op in tail:
            mine = {role: weights[name] for role, name in op.params.items()}
            out = apply(op, [values[name] for name in op.inputs], mine, context)
            values.update(zip((value.name for value in op.outputs), out, strict=True))
        return values[results[0]]

    return call
