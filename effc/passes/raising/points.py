"""Values of a graph at single points: what stands at index (b, h, i, j) of an array never made whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from effc.frontend.graph import Graph
from effc.ir.core import Attr, Func, Op, Value
from effc.ir.interpret import Context, evaluate_func, shape_of
from effc.ir.types import Size, Type, evaluate, product
from effc.passes.raising.biases import SEQUENCE, Scalars, parameters_between
from effc.passes.raising.linear import view
from effc.passes.raising.pointwise import At, Tables
from effc.passes.raising.probe import SHAPING, SIZES, Unseen, peel, region, run_region, signature
from effc.passes.raising.rows import Row, StandIns, constants, drawn, rows_between
from effc.runtime.layers import score_bias

HIDDEN = -9e3
"""A score this low, or lower, takes no part in a softmax."""


@dataclass(frozen=True)
class Form:
    """What `attention` takes: attributes, the region added to scores, and the tables that it reads."""

    attrs: dict[str, Attr]
    bias: Func | None = None
    tables: tuple[int, ...] = ()  # places among the parameters between scores and softmax
    keyed: tuple[int, ...] = ()  # places among the rows that are read there: at the key, at the query
    asked: tuple[int, ...] = ()


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

    def form(self, z: str, scores: str, where: Where, context: int, ones: Sequence[str] = ()) -> Form:
        """Scale, cap, window and bias of the path from `scores` to the softmax's input `z`.

        Unseen where one of the values `ones`, in the axes of z, is not 1 for a key that is seen.
        """
        rows = rows_between(self.graph, z, scores, ones)
        text = signature(self.graph, [z, *ones], [scores, *(row.name for row in rows)]) + f"@{context} {where}"
        if text not in self.known:
            mask = _Mask(self.graph, z, scores, rows, where, context)
            self.known[text] = mask.form()
            mask.want_ones(ones)
        return self.known[text]


class _Mask:
    """One softmax input as a function of (score, head, query position, key position)."""

    def __init__(
        self, graph: Graph, z: str, scores: str, rows: Sequence[Row], where: Where, context: int
    ) -> None:  # fmt: skip
        self.graph, self.z, self.scores, self.rows = graph, z, graph.find(scores), rows
        self.given = [self.scores, *(row.name for row in rows)]
        self.stand: StandIns = {}
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
        visible, bias = self._open() if self.rows else self._small()
        window = self._window()
        scale, cap = self._response()
        attrs: dict[str, Attr] = {}
        if scale != 1.0:
            attrs["scale"] = scale
        if window:
            attrs["window"] = window
        if cap:
            attrs["softcap"] = cap
        if window is None:
            return self._written(attrs | {"mask": "region"}, visible)
        return self._added(attrs, visible, bias)

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        """Stand-ins for rows under which most keys are seen: what causality and window leave; then as `_small`."""
        found: list[tuple[int, StandIns]] = []
        for stand in constants(self.rows, self.sizes):
            self.stand = stand
            found.append((int(self._small()[0].sum()), stand))
        self.stand = max(found, key=lambda pair: pair[0])[1]
        return self._small()

    def _added(self, attrs: dict[str, Attr], visible: np.ndarray, bias: np.ndarray) -> Form:
        """With what is added to the scores: nothing, a slope a head, or whatever the graph computes there."""
        if not self.tables.touched and not self.rows:
            try:
                slope = _linear_bias(self.graph, bias, visible)
                return Form(attrs | {"mask": "region"} if slope else attrs, slope)
            except Unseen:
                pass  # no straight line
        return self._written(attrs | {"mask": "region"}, visible)

    def _written(self, attrs: dict[str, Attr], visible: np.ndarray) -> Form:
        """The bias as a region of its own, held against the graph with random parameters and rows."""
        at = Scalars(self.graph, self.scores, self.rows)
        apart = {a: at.number(0) for a in range(len(self.where.axes.sizes))}
        heads = [evaluate(self.where.axes.sizes[a], {}) for a in self.where.axes.heads]
        apart |= dict(zip(self.where.axes.heads, at.apart(heads, "h"), strict=True))
        apart |= {self.where.axes.query: "i", self.where.axes.key: "j"}
        if self.rows:
            apart[self.where.axes.batch] = SEQUENCE
        sizes = self.where.axes.sizes
        index = tuple(at.flat([sizes[a] for a in g], [apart[a] for a in g]) for g in self.where.layout)
        found = at.region(at.value(self.z, index))
        params = parameters_between(self.graph, self.z, self.given)
        names = [row.name for row in self.rows]
        keyed, asked = (tuple(names.index(n) for n in side) for side in (at.keyed, at.asked))
        counts = {"keyed": len(keyed), "asked": len(asked)}
        form = Form(
            attrs | {k: n for k, n in counts.items() if n}, found, tuple(params.index(p) for p in at.used), keyed, asked
        )
        self._hold(form, list(at.used), visible)
        return form

    def _hold(self, form: Form, used: list[str], visible: np.ndarray) -> None:
        """Unseen where the region is not what the graph adds to the scores."""
        answer = float(self._at(1.0, 0, 5, 5)) - float(self._at(0.0, 0, 5, 5))
        for seed in range(4 if self.rows else 1):
            self.stand = drawn(self.rows, self.sizes, self._literals(), seed)
            self.tables.random = True
            self._hold_drawn(form, used, visible, answer)
            if self.rows:
                self._hold_far(int(str(form.attrs.get("window", 0))))
            self.tables.random = False

    def _hold_drawn(self, form: Form, used: list[str], visible: np.ndarray, answer: float) -> None:
        """The same for the first positions, with what now stands for rows and parameters."""
        n = len(visible)
        grid = (np.arange(self.heads)[:, None, None], np.arange(n)[None, :, None], np.arange(n)[None, None])
        zero, one = (self._at(s, *grid) for s in (0.0, 1.0))
        made = self._added_by(form, used, n)
        seen = np.broadcast_to(visible, zero.shape) & ((zero > self.limit) | (not self.rows))
        far = np.isinf(made) | np.isinf(zero)
        if (made[:, ~visible & np.tri(n, dtype=bool)] > self.limit).any() and not form.attrs.get("window"):
            raise Unseen("keys are hidden by more than what is added to the scores")
        same = np.allclose(np.where(far, 0, made)[:, visible], np.where(far, 0, zero)[:, visible], rtol=1e-5, atol=1e-5)
        alone = np.allclose(one[seen] - zero[seen], answer, rtol=1e-4, atol=1e-4)
        if not same or not alone or (far & seen).any():
            raise Unseen("what is added to the scores is not added alone")

    def _added_by(self, form: Form, used: list[str], n: int) -> np.ndarray:
        """The region at the first n positions, [heads,n,n]."""
        assert form.bias is not None
        func, tables = form.bias, [jnp.asarray(self.tables.array(self.graph, p)) for p in used]
        context = Context(dict(self.sizes), jnp.zeros((1, 1), jnp.int32))
        given = [jnp.asarray(row.ordered(self.stand[row.name])[:, :n]) for row in self.rows]

        def bias(*scalars: Any) -> Any:
            return evaluate_func(func, (*scalars, *tables), {}, context)[0]

        keyed, asked = ([given[at] for at in side] for side in (form.keyed, form.asked))
        where = jnp.arange(n, dtype=jnp.int32)[None]
        return np.asarray(score_bias(bias, where, n, self.heads, keyed, asked))[0]

    def _hold_far(self, window: int) -> None:
        """Unseen where what stands for rows shows keys that are later or out of the window."""
        queries, keys = self._some(), np.arange(self.context)
        inside = (keys[None] <= queries[:, None]) & (keys[None] > queries[:, None] - (window or self.context))
        if (self._seen(queries, keys) & ~inside).any():
            raise Unseen("which keys a query may see depends on the tokens")

    def want_ones(self, names: Sequence[str]) -> None:
        """Unseen where masks of the weights change them."""
        for seed in range(4 if self.rows else 1):
            self.stand = drawn(self.rows, self.sizes, self._literals(), seed)
            for i in self._some() if names else ():
                seen = self._at(0.0, 0, i, np.arange(self.context)) > self.limit
                for name in names:
                    of_head = [self._at(0.0, h, i, np.arange(self.context), name) for h in range(self.heads)]
                    if any((x[seen] != 1).any() for x in of_head):
                        raise Unseen("weights are masked after they were summed")

    def _small(self) -> tuple[np.ndarray, np.ndarray]:
        """Visibility [n,n] and bias [heads,n,n] of the first positions; later keys must be hidden."""
        n = min(24, self.context)
        i, j = np.arange(n)[None, :, None], np.arange(n)[None, None, :]
        z = self._at(0.0, np.arange(self.heads)[:, None, None], i, j)
        later = np.broadcast_to(j > i, z.shape)
        if np.isnan(z).any():
            raise Unseen("the mask is not a number somewhere")
        if z[later].max() > HIDDEN:
            raise Unseen("not causal: a query sees later keys")
        # halfway to the mask's own number: linear biases of long contexts pass any fixed one
        self.limit = max(float(z[later].max()) / 2, -1e30)
        hidden = z <= self.limit
        if (hidden != hidden[:1]).any():
            raise Unseen("heads see different keys")
        return ~hidden[0], np.where(hidden, 0, z)

    def _window(self) -> int | None:
        """How many keys up to its own a query sees; 0 for all, None where these are not the nearest."""
        queries, keys = self._some(), np.arange(self.context)
        seen = self._seen(queries, keys)
        if (seen & (keys[None] > queries[:, None])).any():
            raise Unseen("not causal: a query sees later keys")
        width = int(seen[-1].sum())
        wanted = (keys[None] <= queries[:, None]) & (keys[None] > queries[:, None] - width)
        if (seen != wanted).any():
            return None
        return width if width < self.context else 0

    def _some(self) -> np.ndarray:
        """Queries that are looked at: the first, the last, and those about powers of 2."""
        last = self.context - 1
        some = {*range(min(24, self.context)), *(2**p + d for p in range(5, 20) for d in (-1, 0, 1)), last // 3, last}
        return np.array([i for i in sorted(some) if i <= last])

    def _seen(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Which keys take part, [queries,keys]."""
        return np.stack([self._at(0.0, 0, i, keys) > self.limit for i in queries])

    def _literals(self) -> list[float]:
        """Numbers that the path from scores to softmax is written with."""
        consts = (op.attrs["value"] for op in region(self.graph, [self.z], self.given) if op.kind == "const")
        return [float(v) for v in consts if isinstance(v, int | float) and not isinstance(v, bool)]

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
        literals = [v for v in self._literals() if v]
        near = [v for v in [1.0, *literals, *(1 / v for v in literals)] if slope and abs(v / slope - 1) < within]
        return _short(near[0]) if near else slope

    def _at(self, score: float, head: Any, i: Any, j: Any, name: str = "") -> np.ndarray:
        """z, or another value in its axes, where the score is `score`."""
        apart = dict(zip(self.head_axes, np.unravel_index(np.asarray(head), self.head_shape), strict=True))
        apart |= {self.where.axes.query: np.asarray(i), self.where.axes.key: np.asarray(j)}
        places = tuple(np.asarray(self._merged(group, apart)) for group in self.where.layout)
        at = At(self.graph, self.sizes, {self.scores: np.float32(score)}, self.tables, self.stand)
        value = at.value(name or self.z, at.clamped(name, places) if name else places)
        return np.broadcast_to(value, np.broadcast_shapes(*(p.shape for p in places)))

    def _merged(self, group: tuple[int, ...], apart: dict[int, Any]) -> Any:
        """The index along an axis that is several axes put together."""
        return merged(group, apart, self.where.axes, self.sizes)


def merged(group: tuple[int, ...], apart: dict[int, Any], axes: Axes, sizes: dict[str, int]) -> Any:
    """The index along an axis that is several axes put together."""
    index: Any = 0
    for axis in group:
        index = index * evaluate(axes.sizes[axis], sizes) + apart[axis]
    return index


def sinks(graph: Graph, sink: str | float, where: Where) -> str:
    """The parameter f32[heads] that a value in the axes of the scores is, one number a head."""
    axes = where.axes
    heads = tuple(evaluate(axes.sizes[a], {}) for a in axes.heads)
    if not isinstance(sink, str):
        return graph.constant(np.full(int(np.prod(heads)), sink, np.float32), "sinks")
    op = graph.op(peel(graph, sink, SHAPING))
    param = graph.params[op.params["value"]] if op is not None and op.kind == "param" else None
    if op is None or param is None:
        raise Unseen("what else is summed with the scores is no parameter")
    numbered = np.arange(np.prod(heads), dtype=np.float32)
    if shape_of(param.type, {}) != heads and evaluate(product(param.type.shape), {}) != numbered.size:
        raise Unseen("what else is summed with the scores is no number a head")
    (laid,) = run_region(graph, [sink], {op.out.name: numbered.reshape(shape_of(op.out.type, {}))})
    for row in (0, -1):  # of the first sequence and token, and of the last
        found = [_of_head(laid, where, at, row) for at in np.ndindex(*heads)]
        if found != numbered.tolist():
            raise Unseen("what else is summed with the scores is no number a head")
    return view(graph, param, (numbered.size,), None)


def _of_head(laid: np.ndarray, where: Where, head: tuple[int, ...], row: int) -> float:
    """A number of an array in the axes of z, which may have 1 for a size."""
    axes = where.axes
    sizes = {"b": SIZES["b"], "t": SIZES["t"]}
    apart = {axes.batch: row % sizes["b"], axes.query: row % sizes["t"], axes.key: 0}
    apart |= dict(zip(axes.heads, head, strict=True))
    index = [merged(group, apart, axes, sizes) for group in where.layout]
    return float(laid[tuple(0 if n == 1 else i for n, i in zip(laid.shape, index, strict=True))])


def _short(x: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(x)))


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
