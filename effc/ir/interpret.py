"""Run the IR op by op: the meaning that emitted programs are held against.

Ops and functions without `repeat` here; whole modules in `effc.ir.stream`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effc.errors import EffcError
from effc.ir.core import Attr, Func, Op, Ref
from effc.ir.routed import Routed
from effc.ir.types import Dim, Type, evaluate
from effc.runtime import layers, primitives
from effc.runtime.coded import seen
from effc.runtime.qarray import QArray
from effc.runtime.window import COMBINED

Weight = Any  # jax.Array or QArray
Sizes = Mapping[str, int]


@dataclass
class Context:
    """What ops that look at other tokens need: where this call's tokens stand, and keys kept so far."""

    sizes: Sizes
    positions: Array  # i32[b,t]
    cache: dict[str, tuple[Array, ...]] | None = None  # by op and run of its block; None: no earlier tokens
    capacity: int = 0
    weights: Mapping[str, Weight] = field(default_factory=dict[str, Weight])  # by name: what regions read
    routed: Routed | None = None  # in a layer that only some tokens run


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


def apply(op: Op, operands: Sequence[Array], weights: Mapping[str, Weight], context: Context) -> Sequence[Array]:
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


def _param(op: Op, operands: Any, weights: Mapping[str, Weight], attrs: Any, context: Context) -> Sequence[Array]:
    value = weights["value"]
    return [value.dequantize() if isinstance(value, QArray) else value]


def _positions(op: Op, operands: Any, weights: Any, attrs: Any, context: Context) -> Sequence[Array]:
    return [context.positions]


def _attention(
    op: Op, operands: Sequence[Array], weights: Mapping[str, Weight], attrs: dict[str, Any], context: Context
) -> Sequence[Array]:
    q, k, v, *extra = operands
    k, v = (seen(x, attrs.get("cache", "float")) for x in (k, v))
    keyed, rows = attrs.get("keyed", 0), attrs.get("keyed", 0) + attrs.get("asked", 0)
    attrs = {key: value for key, value in attrs.items() if key not in {"mask", "keyed", "asked", "cache"}}
    bias = _bias(op.regions["bias"], extra[rows:], context) if "bias" in op.regions else None
    if context.routed is not None:
        if rows:
            raise EffcError(f"{op.loc}: tokens that skip a depth have no row for what this attention reads a token")
        attrs |= {"sinks": weights.get("sinks")}
        return [context.routed.attend(op, q, k, v, context.positions, bias, attrs)]
    k, v, *mine = _kept(op, (k, v, *extra[:keyed]), context)
    rest = (bias, mine, extra[keyed:rows], weights.get("sinks"))
    return [layers.attention(q, k, v, context.positions, *rest, **attrs)]


def _bias(region: Func, extra: Sequence[Array], context: Context) -> Any:
    """The region as a function of scalars and rows; what it reads whole is bound now."""

    def bias(*scalars: Array) -> Array:
        (out,) = evaluate_func(region, (*scalars, *extra), context.weights, context)
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
    kept = tuple(old.at[rows, context.positions].set(x) for old, x in zip(context.cache[key], new, strict=True))
    context.cache[key] = kept
    return kept


def _keep(op: Op, operands: Sequence[Array], weights: Any, attrs: Any, context: Context) -> Sequence[Array]:
    kind = attrs.get("cache", "float")
    _kept(op, (*(seen(x, kind) for x in operands[:2]), *operands[2:]), context)
    return operands


def _poisoned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Unfilled rows hold large finite values: reading one shows."""
    return jnp.full(shape, 1e4 if jnp.issubdtype(dtype, jnp.floating) else 1, dtype)


def _window(op: Op, operands: Sequence[Array], weights: Any, attrs: Any, context: Context) -> Sequence[Array]:
    count, back = len(operands) - attrs.get("fixed", 0), attrs.get("lookback", -1)
    rows, fixed, body = tuple(operands[:count]), operands[count:], op.regions["body"]
    b, t = rows[0].shape[:2]
    if back:
        rows = _kept(op, rows, context)
    if context.cache is None or not back:
        return evaluate_func(body, [*rows, *fixed], context.weights, _from_start(b, t))
    start = jnp.zeros(b, jnp.int32)
    if 0 < back < rows[0].shape[1] - t:
        start = jnp.clip(context.positions[:, 0] - back, 0, rows[0].shape[1] - t - back)
        rows = tuple(_taken(x, start[:, None] + jnp.arange(back + t)) for x in rows)
    outs = evaluate_func(body, [*rows, *fixed], context.weights, _from_start(b, rows[0].shape[1]))
    return [_taken(x, context.positions - start[:, None]) for x in outs]


def _from_start(b: int, t: int) -> Context:
    return Context({"b": b, "t": t}, jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)))


def _taken(x: Array, index: Array) -> Array:
    """Rows index[b,n] of x[b,S,...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _running(op: Op, operands: Sequence[Array], weights: Any, attrs: Any, context: Context) -> Sequence[Array]:
    along, both = COMBINED[attrs["fn"]]
    total = along(operands[0], 1)
    (before,) = _previous(op, (total,), context)
    if before is not None:
        total = jnp.where(_some(context, total.ndim), both(before[:, None], total).astype(total.dtype), total)
    _kept(op, (total,), context)
    return [total]


def _recur(op: Op, operands: Sequence[Array], weights: Any, attrs: Any, context: Context) -> Sequence[Array]:
    consts, carry = attrs["consts"], attrs["carry"]
    fixed, first, rows = operands[:consts], operands[consts : consts + carry], operands[consts + carry :]
    b, t = context.positions.shape
    shapes = tuple(jax.ShapeDtypeStruct((b, 1, *x.shape[1:]), x.dtype) for x in first)
    old = _previous(op, shapes, context)
    state = [x if y is None else jnp.where(_some(context, x.ndim), y, x) for x, y in zip(first, old, strict=True)]
    body, found = op.regions["body"], []
    inner = Context({"b": 1, "t": 1}, jnp.zeros((1, 1), jnp.int32), weights=context.weights)
    one = jax.vmap(lambda s, x: evaluate_func(body, [*fixed, *s, *x], context.weights, inner))
    for i in range(t):
        out = one(state, [x[:, i] for x in rows])
        state = out[:carry]
        found.append(out)
    kept, results = (tuple(map(partial(jnp.stack, axis=1), zip(*part))) for part in _split(found, carry))
    _kept(op, kept, context)
    return results


def _split(found: Sequence[Sequence[Array]], at: int) -> tuple[list[Sequence[Array]], list[Sequence[Array]]]:
    return [out[:at] for out in found], [out[at:] for out in found]


def _previous(op: Op, like: Sequence[Any], context: Context) -> Sequence[Array | None]:
    """The row before this call's of what is kept, [b,...]; None where there is no cache."""
    key = f"/{op.outputs[0].name}"
    if context.cache is None:
        return [None] * len(like)
    if key not in context.cache:
        return [_poisoned((x.shape[0], *x.shape[2:]), x.dtype) for x in like]
    at = jnp.maximum(context.positions[:, :1] - 1, 0)
    return [_taken(x, at)[:, 0] for x in context.cache[key]]


def _some(context: Context, rank: int) -> Array:
    """Whether there are earlier tokens, for each sequence."""
    return (context.positions[:, 0] > 0).reshape(-1, *(1,) * (rank - 1))


_SPECIAL: dict[str, Callable[..., Sequence[Array]]] = {
    "const": _const, "param": _param, "positions": _positions, "attention": _attention, "window": _window,
    "running": _running, "recur": _recur, "keep": _keep,
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
