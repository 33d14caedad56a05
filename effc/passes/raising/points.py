"""Values of a graph at single points: what stands at index (b, h, i, j) of an array never made whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from effc.frontend.graph import Graph
from effc.ir.core import Attr, Func, Op, Value
from effc.ir.interpret import Context, concrete, evaluate_func, shape_of
from effc.ir.ops import ELEMENTWISE
from effc.ir.types import Size, Type, evaluate
from effc.passes.raising.biases import Scalars, parameters_between
from effc.passes.raising.probe import Unseen, constant_of, region, run_region, signature
from effc.runtime import primitives
from effc.runtime.layers import score_bias

Index = tuple[np.ndarray, ...]
MANY = 1 << 22
"""Values of fewer elements may be made whole where there is no rule for a point of them."""

HIDDEN = -9e3
"""A score this low, or lower, takes no part in a softmax."""


@dataclass(frozen=True)
class Form:
    """What `attention` takes: attributes, the region added to scores, and the tables that it reads."""

    attrs: dict[str, Attr]
    bias: Func | None = None
    tables: tuple[int, ...] = ()  # places among the parameters between scores and softmax


class Axes(Protocol):
    """Which axis of the scores' product is what."""

    @property
    def batch(self) -> int: ...
    @property
    def query(self) -> int: ...
    @property
    def key(self) -> int: ...
    @property
    def heads(self) -> tuple[int, ...]: ...
    @property
    def sizes(self) -> tuple[Size, ...]: ...


@dataclass(frozen=True)
class Where:
    """What each axis of the softmax's input is made of."""

    axes: Axes
    layout: tuple[tuple[int, ...], ...]


class Points:
    """Evaluates values at points, tokens anywhere up to a length."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[str, Form] = graph.memo.setdefault("masks", {})

    def form(self, z: str, scores: str, where: Where, context: int) -> Form:
        """Scale, cap, window and bias of the path from `scores` to the softmax's input `z`."""
        text = signature(self.graph, [z], [scores]) + f"@{context} {where}"
        if text not in self.known:
            self.known[text] = _Mask(self.graph, z, scores, where, context).form()
        return self.known[text]


class _Mask:
    """One softmax input as a function of (score, head, query position, key position)."""

    def __init__(self, graph: Graph, z: str, scores: str, where: Where, context: int) -> None:
        self.graph, self.z, self.scores = graph, z, graph.find(scores)
        self.sizes = {"b": 1, "t": context}
        self.context, self.where = context, where
        axes = where.axes
        self.head_axes = (axes.batch, *axes.heads)
        self.head_shape = tuple(evaluate(axes.sizes[a], self.sizes) for a in self.head_axes)
        self.heads = int(np.prod(self.head_shape))
        self.limit = HIDDEN  # what hides a key in this mask
        self.tables = Tables()
        if where.layout[-1] != (axes.key,):
            raise Unseen("keys are not the axis that the softmax sums over")

    def form(self) -> Form:
        """The attributes of `attention`, and the bias region if there is one. Parameters are 0 at first."""
        visible, bias = self._small()
        window = self._window()
        scale, cap = self._response()
        attrs: dict[str, Attr] = {}
        if scale != 1.0:
            attrs["scale"] = scale
        if window:
            attrs["window"] = window
        if cap:
            attrs["softcap"] = cap
        added, tables = self._added(visible, bias)
        return Form(attrs | {"mask": "region"} if added else attrs, added, tables)

    def _added(self, visible: np.ndarray, bias: np.ndarray) -> tuple[Func | None, tuple[int, ...]]:
        """What is added to the scores: nothing, a slope a head, or whatever the graph computes there."""
        if not self.tables.touched:
            try:
                return _linear_bias(self.graph, bias, visible), ()
            except Unseen:
                pass  # no straight line
        return self._written(visible)

    def _written(self, visible: np.ndarray) -> tuple[Func, tuple[int, ...]]:
        """The bias as a region of its own, held against the graph with random parameters."""
        at = Scalars(self.graph, self.scores)
        apart = {a: at.number(0) for a in range(len(self.where.axes.sizes))}
        heads = [evaluate(self.where.axes.sizes[a], {}) for a in self.where.axes.heads]
        apart |= dict(zip(self.where.axes.heads, at.apart(heads, "h"), strict=True))
        apart |= {self.where.axes.query: "i", self.where.axes.key: "j"}
        sizes = self.where.axes.sizes
        index = tuple(at.flat([sizes[a] for a in g], [apart[a] for a in g]) for g in self.where.layout)
        found = at.region(at.value(self.z, index))
        params = parameters_between(self.graph, self.z, self.scores)
        self._hold(found, list(at.used), visible)
        return found, tuple(params.index(p) for p in at.used)

    def _hold(self, found: Func, used: list[str], visible: np.ndarray) -> None:
        """Unseen where the region is not what the graph adds to the scores."""
        n = len(visible)
        self.tables.random = True
        grid = (np.arange(self.heads)[:, None, None], np.arange(n)[None, :, None], np.arange(n)[None, None])
        zero, one = (self._at(s, *grid) for s in (0.0, 1.0))
        extra = [jnp.asarray(self.tables.array(self.graph, p)) for p in used]
        context = Context(dict(self.sizes), jnp.zeros((1, 1), jnp.int32))

        def bias(i: Any, j: Any, h: Any) -> Any:
            return evaluate_func(found, (i, j, h, *extra), {}, context)[0]

        made = np.asarray(score_bias(bias, jnp.arange(n, dtype=jnp.int32)[None], n, self.heads))[0]
        self.tables.random = False
        answer = float(self._at(1.0, 0, 5, 5)) - float(self._at(0.0, 0, 5, 5))
        same = np.allclose(made[:, visible], zero[:, visible], rtol=1e-5, atol=1e-5)
        if not same or not np.allclose((one - zero)[:, visible], answer, rtol=1e-4, atol=1e-4):
            raise Unseen("what parameters add to the scores is not added alone")

    def _small(self) -> tuple[np.ndarray, np.ndarray]:
        """Visibility [n,n] and bias [heads,n,n] of the first positions; later keys must be hidden."""
        n = min(24, self.context)
        i, j = np.arange(n)[None, :, None], np.arange(n)[None, None, :]
        z = self._at(0.0, np.arange(self.heads)[:, None, None], i, j)
        later = np.broadcast_to(j > i, z.shape)
        if z[later].max() > HIDDEN:
            raise Unseen("not causal: a query sees later keys")
        # halfway to the mask's own number: linear biases of long contexts pass any fixed one
        self.limit = max(float(z[later].max()) / 2, -1e30)
        hidden = z <= self.limit
        if (hidden != hidden[:1]).any():
            raise Unseen("heads see different keys")
        return ~hidden[0], np.where(hidden, 0, z)

    def _window(self) -> int:
        """How many keys up to its own a query sees; 0 for all."""
        last = self.context - 1
        some = sorted(
            {
                *range(min(24, self.context)),
                *(2**p + d for p in range(5, 20) for d in (-1, 0, 1)),
                last // 3,
                last,
            }
        )
        queries = np.array([i for i in some if i <= last])
        keys = np.arange(self.context)
        seen = np.stack([self._at(0.0, 0, i, keys) > self.limit for i in queries])
        if (seen & (keys[None] > queries[:, None])).any():
            raise Unseen("not causal: a query sees later keys")
        width = int(seen[-1].sum())
        wanted = (keys[None] <= queries[:, None]) & (keys[None] > queries[:, None] - width)
        if width == 0 or (seen != wanted).any():
            raise Unseen("the mask is neither causal nor a window")
        return width if width < self.context else 0

    def _response(self) -> tuple[float, float]:
        """Scale and soft cap: how z answers to the score."""
        grid = np.array([-300.0, -30, -3, -1, -1e-2, 1e-2, 1, 3, 30, 300], np.float32)
        z = np.array([float(self._at(s, 0, 5, 5)) - float(self._at(0.0, 0, 5, 5)) for s in grid])
        other = np.array(
            [float(self._at(s, self.heads - 1, 9, 9)) - float(self._at(0.0, self.heads - 1, 9, 9)) for s in grid]
        )
        if not np.allclose(z, other, rtol=1e-4, atol=1e-4):
            raise Unseen("the scale of the scores depends on the position or head")
        scale = self._literal_near(_short((z[6] - z[3]) / 2), 1e-5)
        if np.allclose(z, scale * grid, rtol=1e-4):
            return scale, 0.0
        cap = _short((float(self._at(1e7, 0, 5, 5)) - float(self._at(-1e7, 0, 5, 5))) / 2)
        slope = _short((z[5] - z[4]) / 2e-2)
        if np.allclose(z, cap * np.tanh(slope * grid / cap), rtol=1e-3, atol=1e-5):
            return self._literal_near(slope, 1e-3), cap
        raise Unseen("scores reach the softmax by a formula that is neither a scale nor a soft cap")

    def _literal_near(self, slope: float, within: float) -> float:
        """The literal that a measured slope is, where there is one."""
        literals = [
            float(v) for op in region(self.graph, [self.z], [self.scores]) if op.kind == "const"
            for v in [op.attrs["value"]] if isinstance(v, float) and v
        ]  # fmt: skip
        near = [v for v in [1.0, *literals, *(1 / v for v in literals)] if slope and abs(v / slope - 1) < within]
        return _short(near[0]) if near else slope

    def _at(self, score: float, head: Any, i: Any, j: Any) -> np.ndarray:
        """z where the score is `score`."""
        apart = dict(zip(self.head_axes, np.unravel_index(np.asarray(head), self.head_shape), strict=True))
        apart |= {self.where.axes.query: np.asarray(i), self.where.axes.key: np.asarray(j)}
        places = tuple(np.asarray(self._merged(group, apart)) for group in self.where.layout)
        z = _At(self.graph, self.sizes, {self.scores: np.float32(score)}, self.tables).value(self.z, places)
        return np.broadcast_to(z, np.broadcast_shapes(*(p.shape for p in places)))

    def _merged(self, group: tuple[int, ...], apart: dict[int, Any]) -> Any:
        """The index along an axis that is several axes put together."""
        index: Any = 0
        for axis in group:
            index = index * evaluate(self.where.axes.sizes[axis], self.sizes) + apart[axis]
        return index


def _short(x: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(x)))


class Tables:
    """Stand-ins for parameters: 0, or random numbers; `touched` once one was read that is no fixed array."""

    def __init__(self) -> None:
        self.touched = self.random = False

    def array(self, graph: Graph, param: str) -> np.ndarray:
        """The fixed array that a parameter is, or its stand-in."""
        fixed = constant_of(graph, param)
        if fixed is not None:
            return fixed
        self.touched = True
        shape = shape_of(graph.params[param].type, {})
        rng = np.random.default_rng(len(param) + sum(shape))
        return rng.normal(size=shape).astype(np.float32) if self.random else np.zeros(shape, np.float32)


class _At:
    """One evaluation at points; `feeds` are values that are the same number everywhere."""

    def __init__(self, graph: Graph, sizes: dict[str, int], feeds: dict[str, np.float32], tables: Tables) -> None:
        self.graph, self.sizes, self.feeds, self.tables = graph, sizes, feeds, tables
        self.memo: dict[object, Any] = {}

    def value(self, name: str, index: Index) -> Any:
        """The value at `index`, arrays of indices that broadcast together, one an axis."""
        name = self.graph.find(name)
        if name in self.feeds:
            return self.feeds[name]
        key = (name, *(id(a) for a in index))
        if key not in self.memo:
            self.memo[key] = (self._compute(name, index), index)  # keeps the index alive, so ids stay unique
        return self.memo[key][0]

    def _compute(self, name: str, index: Index) -> Any:
        op = self.graph.op(name)
        if op is None:
            raise Unseen("the mask depends on the tokens")
        if op.kind in ELEMENTWISE:
            return self._elementwise(op, index)
        rule = _RULES.get(op.kind)
        result = rule(self, op, index) if rule else None
        return self._whole(op, name, index) if result is None else result

    def _elementwise(self, op: Op, index: Index) -> Any:
        attrs = {key: concrete(v, self.sizes) for key, v in op.attrs.items()}
        operands = [self.value(i, self._clamped(i, index)) for i in op.inputs]
        dtypes = [primitives.dtype_of(str(self.graph.type(i).dtype)) for i in op.inputs]
        arrays = [jnp.asarray(x, d) for x, d in zip(operands, dtypes, strict=True)]
        shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
        arrays = [jnp.broadcast_to(a, shape) for a in arrays]
        return np.asarray(primitives.LAX[op.kind.removeprefix("lax.")](*arrays, **attrs))

    def _clamped(self, name: str, index: Index) -> Index:
        """The index into an operand: 0 along axes of size 1."""
        shape = self.graph.type(name).shape
        if not shape:
            return ()
        return tuple(_ZERO if size == 1 else at for size, at in zip(shape, index, strict=True))

    def _whole(self, op: Op, name: str, index: Index) -> Any:
        """Points of a value made whole, if it is small and depends on nothing."""
        shape = shape_of(self.graph.type(name), self.sizes)
        ops = region(self.graph, [name], [])
        if not all(self._constant(p) for o in ops for p in o.params.values()):
            raise Unseen("the mask depends on parameters")
        made = {v.name for o in ops for v in o.outputs}
        if any(i not in made for o in ops for i in o.inputs):
            raise Unseen("the mask depends on the tokens")
        if np.prod(shape) > MANY:
            raise Unseen(f"no rule for a point of '{op.kind}' {op.loc or ''}")
        key = ("whole", name)
        if key not in self.memo:
            params = {p: constant_of(self.graph, p) for o in ops for p in o.params.values()}
            self.memo[key] = run_region(self.graph, [name], {}, self.sizes, params)[0]
        return self.memo[key][tuple(index)] if index else self.memo[key]

    def _constant(self, param: str) -> bool:
        return self.graph.params[param].path in self.graph.constants


_ZERO = np.zeros((), np.int64)


def _const(at: _At, op: Op, index: Index) -> Any:
    return np.asarray(op.attrs["value"])


def _iota(at: _At, op: Op, index: Index) -> Any:
    dimension = op.attrs["dimension"]
    assert isinstance(dimension, int)
    return index[dimension]


def _broadcast(at: _At, op: Op, index: Index) -> Any:
    dims = op.attrs["dims"]
    assert isinstance(dims, tuple)
    picked = tuple(index[d] for d in dims)  # type: ignore[index]
    return at.value(op.inputs[0], at._clamped(op.inputs[0], picked))


def _transpose(at: _At, op: Op, index: Index) -> Any:
    order = op.attrs["permutation"]
    assert isinstance(order, tuple)
    back: list[Any] = [None] * len(order)
    for place, axis in enumerate(order):
        back[axis] = index[place]  # type: ignore[call-overload]
    return at.value(op.inputs[0], tuple(back))


def _reshape(at: _At, op: Op, index: Index) -> Any:
    before, after = at.graph.type(op.inputs[0]).shape, op.out.type.shape
    if [s for s in before if s != 1] == [s for s in after if s != 1]:
        long = iter([i for i, s in zip(index, after, strict=True) if s != 1])
        return at.value(op.inputs[0], tuple(_ZERO if s == 1 else next(long) for s in before))
    sizes = shape_of(op.out.type, at.sizes)
    flat: Any = 0
    for i, s in zip(index, sizes, strict=True):
        flat = flat * s + i
    inner = shape_of(at.graph.type(op.inputs[0]), at.sizes)
    return at.value(op.inputs[0], tuple(np.unravel_index(np.asarray(flat), inner)))


def _slice(at: _At, op: Op, index: Index) -> Any:
    start = concrete(op.attrs["start"], at.sizes)
    strides = concrete(op.attrs.get("strides"), at.sizes) or (1,) * len(start)
    shape = shape_of(at.graph.type(op.inputs[0]), at.sizes)
    moved = tuple(np.asarray(s + i * k) for s, i, k in zip(start, index, strides, strict=True))
    if any((m >= n).any() for m, n in zip(moved, shape, strict=True)):
        raise Unseen(f"a table of {list(shape)} entries is shorter than the context")
    return at.value(op.inputs[0], moved)


def _concatenate(at: _At, op: Op, index: Index) -> Any:
    axis = op.attrs["dimension"]
    assert isinstance(axis, int)
    start, out = 0, None
    for name in op.inputs:
        size = shape_of(at.graph.type(name), at.sizes)[axis]
        inside = np.clip(index[axis] - start, 0, size - 1)
        piece = at.value(name, (*index[:axis], inside, *index[axis + 1 :]))
        out = piece if out is None else np.where(index[axis] >= start, piece, out)
        start += size
    return out


def _embed(at: _At, op: Op, index: Index) -> Any:
    row = np.asarray(at.value(op.inputs[0], index[:-1])).astype(np.int64)
    table = at.tables.array(at.graph, op.params["table"])
    if row.min() < 0 or row.max() >= len(table):
        raise Unseen(f"a table of {len(table)} rows is shorter than the context")
    return table[row, index[-1]]


def _param(at: _At, op: Op, index: Index) -> Any:
    return at.tables.array(at.graph, op.params["value"])[tuple(np.asarray(i) for i in index)]


_RULES = {
    "embed": _embed, "param": _param, "const": _const,
    "lax.iota": _iota, "lax.broadcast_in_dim": _broadcast, "lax.transpose": _transpose,
    "lax.reshape": _reshape, "lax.slice": _slice, "lax.concatenate": _concatenate,
}  # fmt: skip


# -- biases ---------------------------------------------------------------------------------------------
def _linear_bias(graph: Graph, bias: np.ndarray, visible: np.ndarray) -> Func | None:
    """Bias [heads,n,n] as a region: none where it is the same along each row, or slope[h] * (j - i)."""
    n = bias.shape[-1]
    if n < 3:
        return None
    rise = np.diff(bias, axis=-1)
    both = visible[:, 1:] & visible[:, :-1]
    slopes = rise[:, -1, 0] if visible[-1, 0] else rise[:, -1, -1]
    if not np.allclose(np.where(both, rise, 0), np.where(both, slopes[:, None, None], 0), rtol=1e-3, atol=1e-6):
        raise Unseen("the bias of the scores is not linear in the key's position")
    return _alibi(graph, slopes.astype(np.float32)) if np.any(slopes) else None


def _alibi(graph: Graph, slopes: np.ndarray) -> Func:
    name = graph.constant(slopes.reshape(-1, 1), "alibi")
    scalar, one = Type("i32", ()), Type("f32", (1,))
    ops = (
        Op("lax.sub", ("j", "i"), (Value("back", scalar),)),
        Op("lax.convert_element_type", ("back",), (Value("far", Type("f32", ())),), attrs={"dtype": "f32"}),
        Op("embed", ("h",), (Value("row", one),), params={"table": name}),
        Op("lax.reshape", ("row",), (Value("slope", Type("f32", ())),), attrs={"new_sizes": ()}),
        Op("lax.mul", ("far", "slope"), (Value("bias", Type("f32", ())),)),
    )
    return Func("bias", tuple(Value(v, scalar) for v in "ijh"), ops, ("bias",))
