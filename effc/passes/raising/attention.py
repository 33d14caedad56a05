"""A softmax over products of two values, times a third -> attention.

The scores' path to the softmax is a function of (score, query position, key position, head). It is run
on numbers: with scores 0 it gives the mask, which must hide every later key; the rest gives scale, cap
and bias. Masks are evaluated point by point, so that no [length, length] array is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import literal, reshaped, transposed
from effc.ir.core import Attr, Func, Op
from effc.ir.ops import ELEMENTWISE
from effc.ir.tokens import token_axes
from effc.ir.types import Dim, Size, Type, depends, divide, name_dim, product
from effc.passes.raising.points import Points, Unseen
from effc.passes.raising.probe import peel

B, T = name_dim("b"), name_dim("t")
CASTS = frozenset({"lax.convert_element_type"})


@dataclass(frozen=True)
class Softmax:
    """p = softmax(z) over the last axis of z."""

    p: str
    z: str


@dataclass(frozen=True)
class Roles:
    """Axes of a product of two token-indexed values: heads both share, heads of the left alone, tokens, width."""

    batch: int | None  # -1: merged with heads
    shared: tuple[int, ...]
    own: tuple[int, ...]
    token: int
    width: tuple[int, ...]


def raise_attentions(graph: Graph, context: int) -> list[str]:
    """Every softmax attention becomes an `attention`; returns why those that look like one did not."""
    notes: list[str] = []
    for op in graph.order():
        if op.kind == "lax.dot_general" and op.outputs[0].name == graph.find(op.outputs[0].name):
            reason = _raise(graph, graph.op(op.outputs[0].name) or op, context)
            if reason:
                notes.append(f"{op.loc}: attention not raised: {reason}")
    return notes


def _raise(graph: Graph, out: Op, context: int) -> str | None:
    """Raise the attention whose product with the values is `out`; why not, if it looks like one."""
    for side in (0, 1):
        soft = _softmax(graph, out.inputs[side])
        if soft is not None:
            break
    else:
        return None
    try:
        scores = _scores(graph, soft.z)
        form = Points(graph).form(soft.z, scores.outputs[0].name, context)
        made = _build(graph, out, side, soft, scores, form)
    except Unseen as reason:
        return str(reason)
    graph.become(out.outputs[0].name, made)
    return None


def _softmax(graph: Graph, name: str) -> Softmax | None:
    """The softmax over the last axis that a value is, casts aside."""
    p = peel(graph, name, CASTS)
    op = graph.op(p)
    if op is None or op.kind != "lax.div":
        return None
    top = graph.op(peel(graph, op.inputs[0], CASTS))
    below = graph.op(peel(graph, op.inputs[1], CASTS | {"lax.reshape", "lax.broadcast_in_dim"}))
    if top is None or below is None or top.kind != "lax.exp" or below.kind != "lax.reduce_sum":
        return None
    rank = len(graph.type(top.outputs[0].name).shape)
    summed = graph.op(peel(graph, below.inputs[0], CASTS))
    if below.attrs["axes"] != (rank - 1,) or summed != top or len(token_axes(graph.type(p))) != 2:
        return None
    less = graph.op(top.inputs[0])
    if less is not None and less.kind == "lax.sub" and _is_max(graph, less.inputs[1], less.inputs[0]):
        return Softmax(p, graph.find(less.inputs[0]))
    return Softmax(p, graph.find(top.inputs[0]))


def _is_max(graph: Graph, name: str, z: str) -> bool:
    """Whether `name` is the same number for a whole row: then it cancels, whatever it is."""
    op = graph.op(
        peel(graph, name, {"lax.reshape", "lax.broadcast_in_dim", "lax.convert_element_type", "lax.max"})
    )
    return op is not None and op.kind == "lax.reduce_max"


def _scores(graph: Graph, z: str) -> Op:
    """The product of two token-indexed values that z is computed from."""
    stack, seen = [z], set[str]()
    while stack:
        name = stack.pop()
        op = graph.op(name)
        if op is None or name in seen:
            continue
        seen.add(name)
        if op.kind == "lax.dot_general" and all(len(token_axes(graph.type(i))) == 1 for i in op.inputs):
            return op
        if op.kind in ELEMENTWISE or op.kind in {"lax.reshape", "lax.transpose", "lax.broadcast_in_dim"}:
            stack.extend(op.inputs)
    raise Unseen("no product of queries and keys under the softmax")


# -- axes -----------------------------------------------------------------------------------------------
def _roles(graph: Graph, op: Op, side: int) -> Roles:
    """What each axis of one operand of a product is."""
    contract, batch = op.attrs["contract"], op.attrs.get("batch", ((), ()))
    assert isinstance(contract, tuple) and isinstance(batch, tuple)
    summed, shared = contract[side], batch[side]
    assert isinstance(summed, tuple) and isinstance(shared, tuple)
    type = graph.type(op.inputs[side])
    tokens = token_axes(type)
    if len(tokens) != 1 or type.shape[tokens[0]] != T:
        raise Unseen(f"{type} has no axis of tokens alone")
    batches = [a for a, size in enumerate(type.shape) if depends(size, "b")]
    if len(batches) != 1 or batches[0] not in shared:
        raise Unseen(f"{type} has no axis of sequences that the product keeps")
    heads = tuple(a for a in shared if a != batches[0])
    own = tuple(a for a in range(len(type.shape)) if a not in (*summed, *shared, tokens[0]))
    return Roles(batches[0], heads, own, tokens[0], tuple(a for a in summed if a != tokens[0]))  # type: ignore[arg-type]


def _four(graph: Graph, name: str, roles: Roles, width: tuple[int, ...]) -> str:
    """The operand as [b,t,heads,width]; heads are the shared ones, then its own."""
    shape = graph.type(name).shape
    batch = shape[roles.batch or 0]
    merged = divide(batch, B)
    if merged is None:
        raise Unseen(f"axis of size {batch} is not sequences times heads")
    axes = (roles.batch or 0, roles.token, *roles.shared, *roles.own, *width)
    if merged == 1:
        heads = product(tuple(shape[a] for a in (*roles.shared, *roles.own)))
        moved = transposed(graph, name, axes)
        return reshaped(graph, moved, (B, T, heads, product(tuple(shape[a] for a in width))))
    at = roles.batch or 0
    wide = (*shape[:at], B, merged, *shape[at + 1 :])
    apart = reshaped(graph, name, wide)
    shift = [a + 1 if a > at else a for a in axes[1:]]
    moved = transposed(graph, apart, (at, shift[0], at + 1, *shift[1:]))
    inner = [wide[a] for a in (at + 1, *shift[1 : 1 + len(roles.shared) + len(roles.own)])]
    return reshaped(graph, moved, (B, T, product(tuple(inner)), product(tuple(shape[a] for a in width))))


def _heads(graph: Graph, name: str, axes: Sequence[int]) -> Size:
    return product(tuple(graph.type(name).shape[a] for a in axes))


@dataclass(frozen=True)
class _Product:
    """The scores' product: which operand is the queries, both as [b,t,heads,width]."""

    q: str
    k: str
    q_roles: Roles
    k_roles: Roles


def _build(
    graph: Graph, out: Op, side: int, soft: Softmax, scores: Op, form: tuple[dict[str, Attr], Func | None]
) -> str:
    value_side = 1 - side
    key_axis = len(graph.type(soft.p).shape) - 1
    contract = out.attrs["contract"]
    assert isinstance(contract, tuple) and isinstance(contract[side], tuple)
    if contract[side] != (key_axis,):
        raise Unseen("the probabilities are not summed over the keys alone")
    queries = _query_side(graph, scores, soft)
    if len(graph.type(soft.p).shape) != len(scores.out.type.shape):
        raise Unseen("scores change shape on the way to the softmax")
    q_roles, k_roles = _roles(graph, scores, queries), _roles(graph, scores, 1 - queries)
    if k_roles.own:
        raise Unseen("keys have heads that queries lack")
    q = _four(graph, scores.inputs[queries], q_roles, q_roles.width)
    k = _four(graph, scores.inputs[1 - queries], k_roles, k_roles.width)
    v_roles = _value_roles(graph, out, value_side)
    v = _four(graph, out.inputs[value_side], v_roles, v_roles.width)
    k, v = _unrepeated(graph, k), _unrepeated(graph, v)
    k, v = _same_heads(graph, k, v)
    q, k, factor = _unscaled(graph, q, k)
    attrs, region = _scaled(form[0], factor), form[1]
    h, e = graph.type(q).shape[2], graph.type(v).shape[3]
    regions = {"bias": region} if region else {}
    (made,) = graph.add(
        "attention", [q, k, v], Type(graph.type(out.outputs[0].name).dtype, (B, T, h, e)), attrs=attrs,
        regions=regions, loc=scores.loc,
    )  # fmt: skip
    return _as_product(graph, made, out, side, q_roles, graph.type(scores.inputs[queries]))


def _query_side(graph: Graph, scores: Op, soft: Softmax) -> int:
    """Which operand's tokens are the rows: the key's are the softmax's last axis."""
    shape = scores.out.type.shape
    axes = [a for a, size in enumerate(shape) if depends(size, "t")]
    if axes != [len(shape) - 2, len(shape) - 1] and axes[-1] != len(shape) - 1:
        raise Unseen("keys are not the last axis of the scores")
    return 0  # free axes of the left operand stand before those of the right


def _value_roles(graph: Graph, out: Op, side: int) -> Roles:
    """Values: tokens are summed, the free axes are the width."""
    batch = out.attrs.get("batch", ((), ()))
    assert isinstance(batch, tuple) and isinstance(batch[side], tuple)
    type = graph.type(out.inputs[side])
    tokens = token_axes(type)
    shared = batch[side]
    batches = [a for a, size in enumerate(type.shape) if depends(size, "b")]
    if len(tokens) != 1 or len(batches) != 1 or batches[0] not in shared:
        raise Unseen(f"values {type} have no axis of sequences and one of tokens")
    heads = tuple(a for a in shared if a != batches[0])
    width = tuple(a for a in range(len(type.shape)) if a not in (*shared, tokens[0]))
    return Roles(batches[0], heads, (), tokens[0], width)  # type: ignore[arg-type]


def _as_product(graph: Graph, made: str, out: Op, side: int, q: Roles, q_type: Type) -> str:
    """attention's [b,t,h,e] in the axes that the product with the values had."""
    shape = out.out.type.shape
    p_shape = graph.type(out.inputs[side]).shape
    batch = out.attrs.get("batch", ((), ()))
    assert isinstance(batch, tuple) and isinstance(batch[side], tuple)
    # axes of p: those of the scores; each is b, t(query), t(key), or heads in the order q had them
    kept = [a for a in batch[side]] + [a for a in range(len(p_shape) - 1) if a not in batch[side]]  # type: ignore[operator]
    width = (
        list(shape[len(kept) :])
        if side == 0
        else list(shape[len(batch[side]) : len(shape) - (len(kept) - len(batch[side]))])
    )
    merged = divide(next(s for s in p_shape if depends(s, "b")), B) or 1
    head_axes = [a for a in range(len(p_shape) - 1) if not isinstance(p_shape[a], Dim)]
    split = [B, T, *([merged] if merged != 1 else []), *(p_shape[a] for a in head_axes), *width]
    spread = reshaped(graph, made, tuple(split))
    # where each axis of `spread` goes in the product's result
    first = 2 + (merged != 1)
    place = {a: first + n for n, a in enumerate(head_axes)}
    order: list[int] = []
    for a in kept if side == 0 else list(batch[side]):  # type: ignore[arg-type]
        order += _axis_of(a, p_shape, place, merged)
    tail = list(range(first + len(head_axes), len(split)))
    if side == 0:
        order += tail
    else:
        order += tail
        for a in kept[len(batch[side]) :]:
            order += _axis_of(a, p_shape, place, merged)
    moved = transposed(graph, spread, tuple(order))
    return reshaped(graph, moved, shape)


def _axis_of(a: int, shape: Sequence[Size], place: dict[int, int], merged: Size) -> list[int]:
    if a in place:
        return [place[a]]
    if depends(shape[a], "b"):
        return [0] if merged == 1 else [0, 2]
    return [1]


def _unscaled(graph: Graph, q: str, k: str) -> tuple[str, str, float]:
    """Queries and keys without a number they are multiplied by, and that number."""
    factor = 1.0
    names: list[str] = []
    for name in (q, k):
        op = graph.op(_unmoved(graph, name))
        value = literal(graph, op.inputs[1]) if op and op.kind in {"lax.mul", "lax.div"} else None
        if (
            op is not None
            and value
            and not graph.type(op.inputs[1]).shape
            and graph.type(name).dtype == "f32"
        ):
            factor *= float(value) if op.kind == "lax.mul" else 1 / float(value)
            name = _moved_like(graph, name, op.inputs[0])
        names.append(name)
    return names[0], names[1], factor


def _unmoved(graph: Graph, name: str) -> str:
    return peel(graph, name, {"lax.transpose", "lax.reshape"})


def _moved_like(graph: Graph, name: str, base: str) -> str:
    """`base` through the transposes and reshapes that end in `name`."""
    chain: list[Op] = []
    op = graph.op(name)
    while op is not None and op.kind in {"lax.transpose", "lax.reshape"}:
        chain.append(op)
        op = graph.op(op.inputs[0])
    for step in reversed(chain):
        base = graph.one(step.kind, [base], step.out.type, step.loc, **step.attrs)  # type: ignore[arg-type]
    return base


def _scaled(attrs: dict[str, Attr], factor: float) -> dict[str, Attr]:
    scale = float(str(np.float32(float(attrs.get("scale", 1.0)) * factor)))  # type: ignore[arg-type]
    return {k: v for k, v in {**attrs, "scale": scale}.items() if k != "scale" or v != 1.0}


# -- repeated heads -------------------------------------------------------------------------------------
def _unrepeated(graph: Graph, name: str) -> str:
    """[b,t,g,d] before its heads were repeated to [b,t,h,d], each r times in a row; the same where they were not."""
    chain = _shape_chain(graph, name)
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


_MOVES = {"lax.reshape", "lax.transpose", "lax.broadcast_in_dim", "lax.gather", "lax.concatenate", "lax.tile"}


def _shape_chain(graph: Graph, name: str) -> list[str]:
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
    import itertools

    from effc.ir.interpret import shape_of
    from effc.passes.raising.probe import run_region

    sizes = {"b": 2, "t": 3}
    type = graph.type(base)
    if len(type.shape) != 4:
        return None
    ids = np.arange(np.prod(shape_of(type, sizes)), dtype=np.float32).reshape(shape_of(type, sizes))
    (spread,) = run_region(graph, [name], {base: ids}, sizes)
    wanted = spread[:, :, ::ratio]
    if not np.array_equal(np.repeat(wanted, ratio, axis=2), spread):
        return None
    b, t, h, d = graph.type(name).shape
    assert isinstance(h, int)
    for order in itertools.permutations(range(4)):
        if tuple(type.shape[a] for a in order) == (b, t, h // ratio, d):
            if np.array_equal(ids.transpose(order), wanted):
                return transposed(graph, base, order)
    return None


def _same_heads(graph: Graph, k: str, v: str) -> tuple[str, str]:
    """Keys and values with one number of heads."""
    if graph.type(k).shape[2] != graph.type(v).shape[2]:
        raise Unseen(f"keys {graph.type(k)} and values {graph.type(v)} have different heads")
    return k, v
