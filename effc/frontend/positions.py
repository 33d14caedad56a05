"""Values that depend on where a token stands, not on what it is, rewritten as functions of `positions`.

Traced forwards count positions from 0. Cached decoding starts each sequence at its own length, so
iotas, running counts, tables cut to the length and what is computed from them are traced again as a
function of one position vector, and mapped over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.import_jaxpr import import_function
from effc.frontend.simplify import reshaped, transposed
from effc.frontend.trace import POINTS, Traced
from effc.ir.core import Op
from effc.ir.interpret import Context, apply, shape_of
from effc.ir.tokens import Dep, dependence, keeps_tokens_apart, token_axes
from effc.ir.types import NUMPY, Size, Type, depends, name_dim

B, T = name_dim("b"), name_dim("t")


@dataclass(frozen=True)
class Use:
    """A position-dependent value and the op that reads it beside tokens."""

    name: str
    user: Op


def lift_positions(graph: Graph) -> dict[str, str]:
    """Rewrite them in place; by an output of each op whose operands could not be: why."""
    uses = _uses(graph)
    if not uses:
        return {}
    stuck = _Lifter(graph, list(dict.fromkeys(use.name for use in uses))).problems()
    failed = {use.user.outputs[0].name: stuck[use.name] for use in uses if use.name in stuck}
    uses = [use for use in uses if use.user.outputs[0].name not in failed]
    leaves = list(dict.fromkeys(use.name for use in uses))
    lifted = _Lifter(graph, leaves).lift() if leaves else {}
    for use in uses:
        note = _rewire(graph, use, lifted[use.name])
        if note:
            failed[graph.find(use.user.outputs[0].name)] = note
    return failed


def _uses(graph: Graph) -> list[Use]:
    """Where values with a token axis that no token decides meet values that tokens do."""
    ops = graph.order()
    deps = dependence(ops, [value.name for value in graph.inputs])
    found: list[Use] = []
    for op in ops:
        if op.kind == "positions" or deps[op.outputs[0].name] < Dep.TOKENS:
            continue
        found += [Use(i, op) for i in op.inputs if deps[i] < Dep.TOKENS and token_axes(graph.type(i))]
    if deps[graph.find(graph.results[0])] < Dep.TOKENS:
        return []
    return found


class _Lifter:
    """The position-dependent part of a graph as one function of a position vector i32[t]."""

    def __init__(self, graph: Graph, leaves: Sequence[str]) -> None:
        self.graph, self.leaves = graph, leaves
        self.ops = graph.order(leaves)
        self.params = list(dict.fromkeys(name for op in self.ops for name in op.params.values()))
        self.counting = self._counting()
        self.ops = self._needed()

    def _counting(self) -> set[str]:
        """Values that are 0, 1, 2 ... along the tokens, whatever they were computed by."""
        first, second = (self._numbers(b, t) for b, t in POINTS)
        return {name for name in first if name in second and first[name] and second[name]}

    def _numbers(self, b: int, t: int) -> dict[str, bool]:
        """For every value that parameters do not decide: whether it counts tokens."""
        found = jax.jit(lambda: self._candidates(b, t))()
        return {name: self._counts(name, np.asarray(x), t) for name, x in found.items()}

    def _candidates(self, b: int, t: int) -> dict[str, jax.Array]:
        """Values of one number a position."""
        values: dict[str, jax.Array] = {}
        context = Context({"b": b, "t": t}, jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)))
        for op in self.ops:
            constants = {role: self._array(name) for role, name in op.params.items()}
            if any(c is None for c in constants.values()) or any(i not in values for i in op.inputs):
                continue
            out = apply(op, [values[i] for i in op.inputs], constants, context)  # type: ignore[arg-type]
            values.update(zip((v.name for v in op.outputs), out, strict=True))
        return {
            name: x for name, x in values.items() if [s for s in self.graph.type(name).shape if s not in (1, B)] == [T]
        }

    def _array(self, param: str) -> jax.Array | None:
        constant = self.graph.constants.get(self.graph.params[param].path)
        return None if constant is None else jnp.asarray(constant)

    def _counts(self, name: str, x: np.ndarray, t: int) -> bool:
        type = self.graph.type(name)
        if [s for s in type.shape if s not in (1, B)] != [T] or x.dtype.kind not in "iuf":
            return False
        axis = token_axes(type)[0]
        line = np.arange(t, dtype=x.dtype).reshape([t if a == axis else 1 for a in range(x.ndim)])
        return bool((x == line).all())

    def _needed(self) -> list[Op]:
        """Ops that the leaves need once counting values are given."""
        live: list[Op] = []
        wanted = {self.graph.find(name) for name in self.leaves}
        for op in reversed(self.ops):
            names = {v.name for v in op.outputs}
            if names & wanted:
                live.append(op)
                if not names & self.counting:
                    wanted.update(op.inputs)
        return live[::-1]

    def problems(self) -> dict[str, str]:
        """Leaves that mix positions in a way that has no value at one position, and why."""
        found: dict[str, str] = {}  # of every value
        for op in self.ops:
            if op.outputs[0].name in self.counting:
                continue
            why = self._problem(op) or next((found[i] for i in op.inputs if i in found), None)
            found.update({value.name: why for value in op.outputs} if why else {})
        return {leaf: found[name] for leaf in self.leaves if (name := self.graph.find(leaf)) in found}

    def _problem(self, op: Op) -> str | None:
        """What is wrong with one op."""
        type = self.graph.type(op.outputs[0].name)
        axes = token_axes(type)
        before = [axis for i in op.inputs for axis in token_axes(self.graph.type(i))]
        if len(axes) > 1:
            return f"'{op.kind}' makes {type}, which pairs positions"
        made = op.kind in _MADE or _constant_along(op)
        if axes and not before and not made:
            return f"'{op.kind}' depends on the length in a way effc does not follow"
        if before and not keeps_tokens_apart(op, self.graph.types):
            return f"'{op.kind}' of {type} needs the values at other positions"
        return None

    def lift(self) -> dict[str, str]:
        """Each leaf as a function of the tokens' positions: [b, *its shape with b = 1]."""
        first, second = (jax.make_jaxpr(self._batched)(*self._specs(b, t)) for b, t in POINTS)
        (positions,) = self.graph.add("positions", ["tokens"], Type("i32", (B, T)))
        operands = [positions, *(self._value(name) for name in self.params)]
        results = import_function(Traced((), first, second, POINTS), self.graph, operands)
        return dict(zip(self.leaves, results, strict=True))

    def _value(self, param: str) -> str:
        for op in self.ops:
            if op.kind == "param" and op.params["value"] == param:
                return op.outputs[0].name
        type = self.graph.params[param].type
        return self.graph.add("param", (), type, params={"value": param})[0]

    def _specs(self, b: int, t: int) -> list[jax.ShapeDtypeStruct]:
        types = [self.graph.params[name].type for name in self.params]
        arrays = [jax.ShapeDtypeStruct(shape_of(x, {}), NUMPY[str(x.dtype)]) for x in types]
        return [jax.ShapeDtypeStruct((b, t), jnp.int32), *arrays]

    def _batched(self, positions: jax.Array, *params: jax.Array) -> list[jax.Array]:
        weights = dict(zip(self.params, params, strict=True))
        return jax.vmap(lambda row: self._row(row, weights))(positions)

    def _row(self, positions: jax.Array, weights: Mapping[str, jax.Array]) -> list[jax.Array]:
        """The leaves for one sequence whose tokens stand at `positions` i32[t]."""
        sizes = {"b": 1, "t": positions.shape[0]}
        context = Context(sizes, positions[None])
        values: dict[str, jax.Array] = {}
        for op in self.ops:
            name = op.outputs[0].name
            if name in self.counting:
                values[name] = self._count(name, positions)
                continue
            operands = [values[i] for i in op.inputs]
            special = _MADE.get(op.kind)
            cut = special(self.graph, op, operands, positions) if special else None
            mine = {role: weights[p] for role, p in op.params.items()}
            out = [cut] if cut is not None else apply(op, operands, mine, context)
            values.update(zip((v.name for v in op.outputs), out, strict=True))
        return [values[self.graph.find(leaf)] for leaf in self.leaves]

    def _count(self, name: str, positions: jax.Array) -> jax.Array:
        type = self.graph.type(name)
        axis = token_axes(type)[0]
        shape = [positions.shape[0] if a == axis else 1 for a in range(len(type.shape))]
        return positions.reshape(shape).astype(NUMPY[str(type.dtype)])


def _constant_along(op: Op) -> bool:
    """A literal or broadcast: the same at every position."""
    return op.kind in {"const", "lax.broadcast_in_dim"}


def _iota(graph: Graph, op: Op, operands: Sequence[jax.Array], positions: jax.Array) -> jax.Array | None:
    return None  # along another axis than the tokens': counting values are given


def _table(graph: Graph, op: Op, operands: Sequence[jax.Array], positions: jax.Array) -> jax.Array | None:
    """table[c : c + t] -> rows of the table at positions + c."""
    axes, before = token_axes(op.out.type), token_axes(graph.type(op.inputs[0]))
    start = whole_numbers(op.attrs["start"])
    if not axes or before or start is None:
        return None
    rows = jnp.take(operands[0], positions + start[axes[0]], axis=axes[0], mode="clip")
    sizes = [size if isinstance(size, int) else 0 for size in op.out.type.shape]
    kept = [slice(None) if a == axes[0] else slice(s, s + n) for a, (s, n) in enumerate(zip(start, sizes))]
    return rows[tuple(kept)]


def whole_numbers(attr: object) -> list[int] | None:
    """A tuple of plain ints as a list; None where it holds a formula."""
    if not isinstance(attr, tuple):
        return None
    found = [item for item in attr if isinstance(item, int)]
    return found if len(found) == len(attr) else None


_MADE: dict[str, Callable[..., jax.Array | None]] = {"lax.slice": _table, "lax.iota": _iota}
"""Ops that make a token axis out of none, and how each is evaluated at given positions."""


def table_limit(graph: Graph) -> int | None:
    """Rows of the shortest table that positions index: lengths beyond it have no meaning."""
    limits: list[int] = []
    for op in graph.order():
        if op.kind == "lax.slice" and not token_axes(graph.type(op.inputs[0])) and token_axes(op.out.type):
            axis, start = token_axes(op.out.type)[0], whole_numbers(op.attrs["start"])
            size = graph.type(op.inputs[0]).shape[axis]
            if isinstance(size, int) and start is not None:
                limits.append(size - start[axis])
        if op.kind in {"embed", "lax.gather"}:
            limits += _indexed(graph, op)
    return min(limits, default=None)


def _indexed(graph: Graph, op: Op) -> list[int]:
    """Rows of a table read at positions plus a constant, less that constant."""
    index = op.inputs[-1]
    ops = graph.order([index])
    if not ops or any(o.params for o in ops) or not token_axes(graph.type(index)):
        return []
    deps = dependence(ops, [v.name for v in graph.inputs])
    if deps[graph.find(index)] > Dep.NOTHING:
        return []
    values: dict[str, jax.Array] = {}
    b, t = POINTS[0]
    context = Context({"b": b, "t": t}, jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)))
    for o in ops:
        out = apply(o, [values[i] for i in o.inputs], {}, context)
        values.update(zip((v.name for v in o.outputs), out, strict=True))
    found = np.asarray(values[graph.find(index)]).reshape(-1)
    rows = graph.params[op.params["table"]].type.shape[0] if op.kind == "embed" else graph.type(op.inputs[0]).shape[0]
    counts = found.size % t == 0 and bool((np.diff(found.reshape(-1, t), axis=1) == 1).all())
    return [int(rows) - int(found[0])] if counts and isinstance(rows, int) else []


def _rewire(graph: Graph, use: Use, lifted: str) -> str | None:
    """Give the lifted value to one op, its batch axis where the op has it; why not, if it cannot be."""
    old = graph.type(use.name).shape
    axis = _batch_axis(old, use.user)
    if axis is None:
        return f"'{use.user.kind}' reads positions in a way effc does not follow"
    shape = graph.type(lifted).shape  # [b, *old with b = 1]
    if axis < len(old) and depends(old[axis], "t"):  # sequences and tokens merged on one axis
        new = reshaped(graph, lifted, old) if axis == 0 else None
    else:
        order = [a + 1 for a in range(len(old))]
        order[axis] = 0
        front = [a for a in range(len(shape)) if a not in order]
        moved = transposed(graph, lifted, (*front, *order))
        new = reshaped(graph, moved, tuple(shape[a] for a in order))
    if new is None:
        return f"'{use.user.kind}' reads positions in a way effc does not follow"
    _swap(graph, use, new)
    return None


def _batch_axis(shape: Sequence[Size], user: Op) -> int | None:
    """Which axis of the old value holds, or stretches over, the sequences."""
    own = [a for a, size in enumerate(shape) if depends(size, "b")]
    if own:
        return own[0]
    if len(user.outputs[0].type.shape) != len(shape):
        return None
    there = [a for a, size in enumerate(user.outputs[0].type.shape) if depends(size, "b")]
    return there[0] if there and shape[there[0]] == 1 else None


def _swap(graph: Graph, use: Use, new: str) -> None:
    """Replace one operand of one op."""
    op = graph.op(use.user.outputs[0].name) or use.user
    inputs = [new if i == graph.find(use.name) else i for i in op.inputs]
    names = graph.add(
        op.kind,
        inputs,
        [v.type for v in op.outputs],
        params=op.params,
        attrs=op.attrs,
        regions=op.regions,
        loc=op.loc,
    )
    for old, made in zip(op.outputs, names, strict=True):
        graph.become(old.name, made)
