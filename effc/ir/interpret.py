"""Run the IR op by op: the meaning that emitted programs are held against.

`run` takes all arrays at once; `run_chunks` reads the weights layer by layer, so that a model larger
than memory can be checked and evaluated: each layer's weights are read once for all chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effc.errors import EffcError
from effc.ir.core import Attr, Func, Module, Op, Param, Ref, param_uses
from effc.ir.ops import Along, spec_of
from effc.ir.types import NUMPY, Dim, Quant, Type, evaluate
from effc.runtime import layers, primitives
from effc.runtime.qarray import QArray

Weight = Any  # jax.Array or QArray
Sizes = Mapping[str, int]


class Reads(Protocol):
    """One parameter of a weight store."""

    @property
    def param(self) -> Param: ...
    @property
    def read(self) -> Callable[[int], Mapping[str, np.ndarray]]: ...


@dataclass
class Context:
    """What ops that look at other tokens need: where this call's tokens stand, and keys kept so far."""

    sizes: Sizes
    positions: Array  # i32[b,t]
    cache: dict[str, tuple[Array, ...]] | None = None  # by op and run of its block; None: no earlier tokens
    capacity: int = 0
    weights: Mapping[str, Weight] = field(default_factory=dict[str, Weight])  # by name: what regions read


def concrete(attr: Attr | Ref, sizes: Sizes) -> Any:
    """An attribute with its formulas worked out."""
    if isinstance(attr, Dim):
        return evaluate(attr, sizes)
    if isinstance(attr, tuple):
        return tuple(concrete(item, sizes) for item in attr)
    return attr


def shape_of(type: Type, sizes: Sizes) -> tuple[int, ...]:
    """A type's shape in this call."""
    return tuple(evaluate(size, sizes) for size in type.shape)


def apply(
    op: Op, operands: Sequence[Array], weights: Mapping[str, Weight], context: Context
) -> Sequence[Array]:
    """Results of one op (not `repeat`)."""
    attrs = {key: concrete(value, context.sizes) for key, value in op.attrs.items()}
    if op.kind.startswith("lax."):
        return _lax(op, operands, attrs, context)
    if op.kind in _SPECIAL:
        return _SPECIAL[op.kind](op, operands, weights, attrs, context)
    function = getattr(layers, op.kind)
    keep = {"dtype": primitives.dtype_of(str(op.out.type.dtype))} if op.kind in _TYPED else {}
    out = function(*operands, **weights, **attrs, **keep)
    return out if isinstance(out, (tuple, list)) else [out]


_TYPED = frozenset({"norm", "linear", "embed"})


def _lax(op: Op, operands: Sequence[Array], attrs: dict[str, Any], context: Context) -> Sequence[Array]:
    function = primitives.LAX.get(op.kind.removeprefix("lax."))
    if op.kind == "lax.scan":
        body = _callable(op.regions["body"], context)
        return primitives.scan(body, *operands, **attrs)
    if function is None:
        raise EffcError(f"{op.loc}: '{op.kind}' has no meaning in this version")
    out: Any = function(*operands, **attrs)
    return out if isinstance(out, (tuple, list)) else [out]


def _callable(region: Func, context: Context) -> Callable[..., tuple[Array, ...]]:
    def call(*operands: Array) -> tuple[Array, ...]:
        return tuple(evaluate_func(region, operands, {}, context))

    return call


def _const(op: Op, operands: Any, weights: Any, attrs: dict[str, Any], context: Context) -> Sequence[Array]:
    dtype = primitives.dtype_of(str(op.out.type.dtype))
    return [jnp.full(shape_of(op.out.type, context.sizes), attrs["value"], dtype)]


def _param(
    op: Op, operands: Any, weights: Mapping[str, Weight], attrs: Any, context: Context
) -> Sequence[Array]:
    value = weights["value"]
    return [value.dequantize() if isinstance(value, QArray) else value]


def _positions(op: Op, operands: Any, weights: Any, attrs: Any, context: Context) -> Sequence[Array]:
    return [context.positions]


def _attention(
    op: Op, operands: Sequence[Array], weights: Mapping[str, Weight], attrs: dict[str, Any], context: Context
) -> Sequence[Array]:
    q, k, v, *extra = operands
    attrs = {key: value for key, value in attrs.items() if key != "mask"}
    bias = _bias(op.regions["bias"], extra, context) if "bias" in op.regions else None
    k, v = _kept(op, (k, v), context)
    return [layers.attention(q, k, v, context.positions, bias, **attrs)]


def _bias(region: Func, extra: Sequence[Array], context: Context) -> Any:
    """The region as a function of three scalars; further inputs are bound now."""

    def bias(i: Array, j: Array, h: Array) -> Array:
        (out,) = evaluate_func(region, (i, j, h, *extra), context.weights, context)
        return out

    return bias


def _kept(op: Op, new: tuple[Array, ...], context: Context) -> tuple[Array, ...]:
    """Rows of all tokens so far: these after those in the cache."""
    if context.cache is None:
        return new
    key = f"/{op.outputs[0].name}"  # a block's caller puts the number of the run before it
    b = new[0].shape[0]
    if key not in context.cache:
        context.cache[key] = tuple(_poisoned((b, context.capacity, *x.shape[2:]), x.dtype) for x in new)
    rows = jnp.arange(b)[:, None]
    kept = tuple(
        old.at[rows, context.positions].set(x) for old, x in zip(context.cache[key], new, strict=True)
    )
    context.cache[key] = kept
    return kept


def _poisoned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Unfilled rows hold large finite values: reading one shows."""
    return jnp.full(shape, 1e4 if jnp.issubdtype(dtype, jnp.floating) else 1, dtype)


def _window(op: Op, operands: Sequence[Array], weights: Any, attrs: Any, context: Context) -> Sequence[Array]:
    kept = _kept(op, tuple(operands), context)
    whole = kept[0].shape[1]
    body = op.regions["body"]
    sizes = {"b": 1, "t": whole}

    def row(*rows: Array) -> tuple[Array, ...]:
        inner = Context(sizes, jnp.arange(whole, dtype=jnp.int32)[None])
        return tuple(evaluate_func(body, [r[None] for r in rows], context.weights, inner))

    outs = [jnp.stack(parts) for parts in zip(*(row(*(k[i] for k in kept)) for i in range(kept[0].shape[0])))]
    index = context.positions
    return [jax.vmap(lambda full, at: full[0][at])(out, index) for out in outs]


_SPECIAL: dict[str, Callable[..., Sequence[Array]]] = {
    "const": _const, "param": _param, "positions": _positions, "attention": _attention, "window": _window,
}  # fmt: skip


def evaluate_func(
    func: Func, operands: Sequence[Array], weights: Mapping[str, Weight], context: Context
) -> list[Array]:
    """Results of a function without `repeat`; `weights` has every parameter its ops name."""
    values = {value.name: x for value, x in zip(func.inputs, operands, strict=True)}
    context.weights = weights
    for op in func.ops:
        mine = {role: weights[name] for role, name in op.params.items()}
        results = apply(op, [values[name] for name in op.inputs], mine, context)
        values.update(zip((value.name for value in op.outputs), results, strict=True))
    return [values[name] for name in func.results]


# -- whole modules --------------------------------------------------------------------------------------
def weight(lazy: Reads, i: int) -> Weight:
    """The i-th array of a parameter, on the device."""
    arrays, dtype = lazy.read(i), lazy.param.type.dtype
    if not isinstance(dtype, Quant):
        return jnp.asarray(arrays[""], primitives.dtype_of(dtype))
    width = evaluate(lazy.param.type.shape[-1], {})
    zeros = jnp.asarray(arrays["zeros"]) if "zeros" in arrays else None
    codes, scales = jnp.asarray(arrays["codes"]), jnp.asarray(arrays["scales"])
    return QArray(codes, scales, zeros, dtype.bits, dtype.group, dtype.axis, width)


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


@dataclass
class _State:
    """One chunk on its way through the program."""

    group: int
    chunk: int
    context: Context
    values: dict[str, Array] = field(default_factory=dict[str, Array])


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
    func = module.forward()
    states = [state for at, group in enumerate(groups) for state in _states(func, at, group)]
    cut = _tail(func)
    last = _last_use(func)
    for at, op in enumerate(func.ops[:cut]):
        _step(module, store, op, states)
        for state in states:
            for name in [n for n in state.values if last.get(n, -1) <= at and n not in func.results]:
                del state.values[name]
    yield from _finish(func, cut, store, states, rows)


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


def _step(module: Module, store: Mapping[str, Reads], op: Op, states: Sequence[_State]) -> None:
    if op.kind == "repeat":
        _repeat(module, store, op, states)
        return
    held = {name: weight(store[name], 0) for name in params_of([op])}
    weights = {role: held[name] for role, name in op.params.items()}
    run_op = apply if op.regions or op.kind == "attention" else _by_itself(op)
    for state in states:
        state.context.weights = held
        results = run_op(op, [state.values[name] for name in op.inputs], weights, state.context)
        state.values.update(zip((value.name for value in op.outputs), results, strict=True))
        state.context.weights = {}


def params_of(ops: Sequence[Op]) -> list[str]:
    """Parameters that ops read, regions included."""
    inner = [p for op in ops for region in op.regions.values() for p in params_of(region.ops)]
    return list(dict.fromkeys([*(p for op in ops for p in op.params.values()), *inner]))


def _by_itself(op: Op) -> Callable[..., Sequence[Array]]:
    """An op that keeps nothing, compiled: op by op inside it would be many programs."""

    def call(sizes: tuple[tuple[str, int], ...], positions: Array, operands: Any, weights: Any) -> Any:
        return list(apply(op, operands, weights, Context(dict(sizes), positions)))

    jitted = jax.jit(call, static_argnums=0)

    def step(
        op: Op, operands: Sequence[Array], weights: Mapping[str, Weight], context: Context
    ) -> Sequence[Array]:
        return jitted(tuple(sorted(context.sizes.items())), context.positions, list(operands), dict(weights))

    return step


def _repeat(module: Module, store: Mapping[str, Reads], op: Op, states: Sequence[_State]) -> None:
    ref, times, carry = op.attrs["block"], op.attrs["times"], op.attrs.get("carry", 1)
    assert isinstance(ref, Ref) and isinstance(times, int) and isinstance(carry, int)
    block = module.funcs[ref.name]
    names = params_of(block.ops)
    shared = {name: weight(store[name], 0) for name in names if not module.params[name].stack}
    carried = [[state.values[name] for name in op.inputs] for state in states]
    compiled = _compiled(block)
    for i in range(times):
        weights = shared | {name: weight(store[name], i) for name in names if module.params[name].stack}
        for state, operands in zip(states, carried, strict=True):
            operands[:carry] = compiled(state.context, weights, operands, i)
        jax.block_until_ready(carried)
        for state in states:
            _forget(state.context, f"{i}/")
    for state, operands in zip(states, carried, strict=True):
        state.values.update(zip((value.name for value in op.outputs), operands[:carry], strict=True))


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


def _finish(
    func: Func, cut: int, store: Mapping[str, Reads], states: Sequence[_State], rows: int
) -> Iterator[Piece]:
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
    def call(
        sizes: tuple[tuple[str, int], ...], values: dict[str, Array], weights: Mapping[str, Weight]
    ) -> Array:
        context = Context(dict(sizes), jnp.zeros((1, 1), jnp.int32))
        values = dict(values)
        for op in tail:
            mine = {role: weights[name] for role, name in op.params.items()}
            out = apply(op, [values[name] for name in op.inputs], mine, context)
            values.update(zip((value.name for value in op.outputs), out, strict=True))
        return values[results[0]]

    return call


__all__ = [
    "NUMPY",
    "Context",
    "Piece",
    "apply",
    "concrete",
    "evaluate_func",
    "param_uses",
    "run",
    "run_chunks",
    "weight",
]
