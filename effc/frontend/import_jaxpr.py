"""jaxpr -> IR: two traces walked together, every int a formula of b and t, calls inlined, layer scans unrolled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from effc.errors import EffcError
from effc.frontend.captured import Growing, table_of
from effc.frontend.encode import IDENTITY, INLINED, RENAMED, dtype_name, encode, number
from effc.frontend.equations import callee, location, needed, of_library, scan_counts
from effc.frontend.graph import Graph
from effc.frontend.pairs import Pair, halves, has_pairs, is_complex, paired
from effc.frontend.trace import B, T, Traced, formula
from effc.ir.core import Attr, Loc, Param
from effc.ir.rewrite import rename
from effc.ir.types import Size, Type

SMALL = 1
"""Captured arrays of more elements become named constants, read like parameters."""


def import_traces(traced: Traced, longest: int = 2048) -> Graph:
    """The IR of both traces as one function of tokens i32[b,t]; captured arrays are its constants.

    Those that grow with the length are captured once more, at `longest` tokens: they are tables of so many rows.
    """
    try:
        return _imported(_Importer(Graph(), traced.points), traced)
    except Growing:
        long = captured_at(traced, longest)
        return _imported(_Importer(Graph(), traced.points, long), traced)


def _imported(importer: _Importer, traced: Traced) -> Graph:
    first, second = traced.first.jaxpr, traced.second.jaxpr
    env: dict[Any, str] = {}
    *weights, tokens = zip(first.invars, second.invars, strict=True)
    for path, (p, q) in zip(traced.paths, weights, strict=True):
        env[p] = importer.parameter(path, importer.type_of(p.aval, q.aval, path))
    env[tokens[0]] = importer.graph.input("tokens", Type("i32", (B, T)))
    importer.constants_of(traced.first, traced.second, env)
    importer.graph.results = importer.run(first, second, env)
    return importer.graph


def captured_at(traced: Traced, longest: int) -> list[np.ndarray]:
    """All captured arrays, in the order that an import meets them, as they are at `longest` tokens."""
    assert traced.again is not None
    (b, _), _ = traced.points
    third = traced.again(b, longest)
    collector = _Collector(Graph(), (traced.points[0], (b, longest)))
    _imported(collector, replace(traced, second=third))
    return collector.met


def import_function(traced: Traced, graph: Graph, operands: Sequence[str]) -> list[str]:
    """Import a traced function of `operands` into a graph that exists; returns its results there."""
    importer = _Importer(graph, traced.points)
    first, second = traced.first.jaxpr, traced.second.jaxpr
    env: dict[Any, str] = {p: graph.find(name) for p, name in zip(first.invars, operands, strict=True)}
    importer.constants_of(traced.first, traced.second, env)
    return importer.run(first, second, env)


class _Importer:
    def __init__(self, graph: Graph, points: Any, long: Sequence[np.ndarray] | None = None) -> None:
        self.graph = graph
        self.points = points
        self.long = None if long is None else iter(long)  # captured arrays at a greater length
        self.module = ""  # path of the Flax module whose call is being imported
        self.site: Loc | None = None  # the call of a library's function whose ops are being imported

    def inner(self) -> _Importer:
        """An importer of a body with a graph of its own, which meets the next captured arrays."""
        made = _Importer(Graph(), self.points)
        made.long = self.long
        return made

    # -- operands ---------------------------------------------------------------------------------------
    def parameter(self, path: str, type: Type) -> str:
        """A parameter as a value."""
        name = path.replace("/", ".")
        self.graph.params[name] = Param(name, type, path=path)
        return self.graph.add("param", (), type, params={"value": name})[0]

    def constants_of(self, first: Any, second: Any, env: dict[Any, str]) -> None:
        """Bind the arrays that the two traces captured."""
        for var, p, q in zip(first.jaxpr.constvars, first.consts, second.consts, strict=True):
            env[var] = self.held(np.asarray(p), np.asarray(q))

    def held(self, p: np.ndarray, q: np.ndarray) -> Any:
        """A captured array; of complex numbers a pair."""
        if not is_complex(p.dtype):
            return self.captured(p, q)
        return Pair(*(self.captured(x, y) for x, y in zip(halves(p), halves(q), strict=True)))

    def captured(self, p: np.ndarray, q: np.ndarray) -> str:
        """A captured array: a literal where it is one number, else a named constant."""
        long = None if self.long is None else next(self.long)
        if p.shape != q.shape:
            if long is None:
                raise Growing
            return table_of(self.graph, p, q, long, self.type_of(p, q, "lowering").shape)
        if p.shape != q.shape or not np.array_equal(p, q, equal_nan=p.dtype.kind in "fV"):
            raise EffcError(
                f"lowering: the program captures an array that changes with the call, {list(p.shape)} and "
                f"{list(q.shape)} for lengths {self.points[0][1]} and {self.points[1][1]}; want it computed "
                "from the tokens' shape with jax.numpy"
            )
        type = Type(dtype_name(p.dtype), p.shape)
        if p.size <= SMALL:
            return self.graph.one("const", (), type, value=number(p.reshape(())))
        return self.graph.add("param", (), type, params={"value": self.graph.constant(p)})[0]

    def operand(self, p: Any, q: Any, env: dict[Any, Any], loc: Loc) -> Any:
        """The name of a variable's value, or of a new literal."""
        if type(p).__name__ != "Literal":
            return env[p]
        if np.size(p.val) > 1 or is_complex(p.aval.dtype):
            return self.held(np.asarray(p.val), np.asarray(q.val))
        value = self.merge(number(p.val), number(q.val), loc)
        return self.graph.one("const", (), self.type_of(p.aval, q.aval, str(loc)), loc, value=value)

    # -- sizes ------------------------------------------------------------------------------------------
    def merge(self, p: Attr, q: Attr, loc: Loc) -> Attr:
        """One attribute for both traces; ints that differ become formulas."""
        if isinstance(p, tuple) and isinstance(q, tuple) and len(p) == len(q):
            return tuple(self.merge(x, y, loc) for x, y in zip(p, q, strict=True))
        if type(p) is int and type(q) is int:
            return self.size(p, q, str(loc))
        if p == q or (p != p and q != q):
            return p
        first, second = (f"{list(point)}" for point in self.points)
        raise EffcError(
            f"{loc}: a number depends on the size of the call ({p} for tokens {first}, {q} for {second}), want it fixed"
            ": a mean over all tokens or sequences, for instance, lets tokens see later ones"
        )

    def size(self, p: int, q: int, where: str) -> Size:
        """One size for both traces."""
        found = formula(p, q, self.points)
        if found is None:
            raise EffcError(f"{where}: size {p} and {q} at (b, t) = {self.points} is no formula of b and t")
        return found

    def type_of(self, p: Any, q: Any, where: str) -> Type:
        """One type for both traces."""
        try:
            dtype = "f32" if is_complex(p.dtype) else dtype_name(p.dtype)  # of each part
        except (KeyError, TypeError):
            raise EffcError(f"{where}: arrays of dtype {p.dtype} are not supported") from None
        if len(p.shape) != len(q.shape):
            raise EffcError(f"{where}: rank {len(p.shape)} and {len(q.shape)} at the two traced lengths, want one")
        return Type(dtype, tuple(self.size(int(x), int(y), where) for x, y in zip(p.shape, q.shape, strict=True)))

    # -- equations --------------------------------------------------------------------------------------
    def run(self, first: Any, second: Any, env: dict[Any, str], wanted: Sequence[bool] | None = None) -> list[str]:
        """Import the equations of two jaxprs that must be op for op alike; returns the results that are wanted."""
        one, two = needed(first, wanted), needed(second, wanted)
        if [p.primitive.name for p, _ in one] != [q.primitive.name for q, _ in two]:
            self._differs([p for p, _ in one], [q for q, _ in two])
        for (p, used), (q, _) in zip(one, two, strict=True):
            self.equation(p, q, env, used)
        flags = wanted or [True] * len(first.outvars)
        outvars = zip(first.outvars, second.outvars, flags, strict=True)
        return [self.operand(p, q, env, Loc()) if flag else "" for p, q, flag in outvars]

    def equation(self, p: Any, q: Any, env: dict[Any, str], used: Sequence[bool]) -> None:
        """Import one equation, of whose results some are used."""
        name, loc = p.primitive.name, location(p)
        if self.module and not loc.module.startswith(self.module):
            loc = replace(loc, module=f"{self.module}/{loc.module}".rstrip("/"))
        if self.site is not None:
            loc = replace(loc, file=self.site.file, line=self.site.line)
        operands = [self.operand(x, y, env, loc) for x, y in zip(p.invars, q.invars, strict=True)]
        if name in IDENTITY:
            results = operands
        elif has_pairs(p, operands) and name not in INLINED and name != "scan":
            results = self.pairs(p, q, operands, loc)
        elif name in INLINED:
            outer = self.module, self.site
            self.module, self.site = loc.module, loc if loc.file and of_library(p) else self.site
            results = self.body(callee(p), callee(q), operands, used)
            self.module, self.site = outer
        elif name == "scan":
            results = self.scan(p, q, operands, loc, used)
        else:
            results = self.primitive(p, q, operands, loc)
        for var, result in zip(p.outvars, results, strict=True):
            env[var] = result

    def body(
        self, first: Any, second: Any, operands: Sequence[str], wanted: Sequence[bool] | None = None
    ) -> list[str]:  # fmt: skip
        """Import a closed or open jaxpr, with `operands` for its inputs, in its caller's place."""
        env: dict[Any, str] = {}
        if type(first).__name__ == "ClosedJaxpr":
            self.constants_of(first, second, env)
            first, second = first.jaxpr, second.jaxpr
        env |= dict(zip(first.invars, operands, strict=True))
        return self.run(first, second, env, wanted)

    def primitive(self, p: Any, q: Any, operands: list[str], loc: Loc) -> list[str]:
        """Import one primitive op."""
        name = p.primitive.name
        try:
            attrs_p, attrs_q = encode(name, p.params), encode(name, q.params)
        except KeyError as missing:
            raise EffcError(f"{loc}: '{name}' uses {missing}, which effc does not support") from None
        if attrs_p is None or attrs_q is None:
            raise EffcError(f"{loc}: primitive '{name}' has no meaning in the IR{_INSTEAD.get(name, '')}")
        keys = {key: self.merge(attrs_p[key], attrs_q[key], loc) for key in attrs_p}
        types = [self.type_of(x.aval, y.aval, str(loc)) for x, y in zip(p.outvars, q.outvars, strict=True)]
        if name == "squeeze":
            return self.graph.add("lax.reshape", operands, types, attrs={"new_sizes": types[0].shape}, loc=loc)
        return self.graph.add(f"lax.{RENAMED.get(name, name)}", operands, types, attrs=keys, loc=loc)

    def pairs(self, p: Any, q: Any, operands: list[Any], loc: Loc) -> list[Any]:
        """Import an equation on complex numbers as equations on their parts."""
        name = p.primitive.name
        found = paired(self.graph, name, operands, lambda part: self.primitive(p, q, list(part), loc), loc)
        if found is None:
            raise EffcError(f"{loc}: '{name}' of complex numbers is not supported; rewrite that line with real ones")
        return found

    # -- scans ------------------------------------------------------------------------------------------
    def scan(self, p: Any, q: Any, operands: list[str], loc: Loc, used: Sequence[bool]) -> list[str]:
        """Unroll a scan of fixed length (layers); keep one over tokens as an op with a body."""
        if p.params["length"] == q.params["length"]:
            return self._unrolled(p, q, operands, loc, used)
        inner = self.inner()
        first, second = p.params["jaxpr"], q.params["jaxpr"]
        types = [
            inner.type_of(x.aval, y.aval, str(loc))
            for x, y in zip(first.jaxpr.invars, second.jaxpr.invars, strict=True)
        ]
        names = [inner.graph.input(f"a{i}", type) for i, type in enumerate(types)]
        inner.graph.results = inner.body(first, second, names)
        if inner.graph.params:
            raise EffcError(f"{loc}: the body of a scan over tokens captures arrays, want them as operands")
        consts, carry = scan_counts(p)
        attrs = {
            "consts": consts, "carry": carry,
            "length": self.size(p.params["length"], q.params["length"], str(loc)),
            "reverse": bool(p.params["reverse"]),
        }  # fmt: skip
        outs = [self.type_of(x.aval, y.aval, str(loc)) for x, y in zip(p.outvars, q.outvars, strict=True)]
        plain = inner.graph.func("body")
        mark = f"s{len(self.graph.ops)}"  # names of their own: a region may stand inside another
        body = rename(plain, {name: f"{name}{mark}" for name in plain.types()})
        return self.graph.add("lax.scan", operands, outs, attrs=attrs, regions={"body": body}, loc=loc)

    def _unrolled(self, p: Any, q: Any, operands: list[str], loc: Loc, used: Sequence[bool]) -> list[str]:
        (consts, carried), length = scan_counts(p), p.params["length"]
        fixed, state, xs = (
            operands[:consts],
            operands[consts : consts + carried],
            operands[consts + carried :],
        )
        wanted = [*(True for _ in state), *used[carried:]]
        collected: list[list[str]] = []
        turns = range(length - 1, -1, -1) if p.params["reverse"] else range(length)
        for i in turns:
            items = [self.item(x, i, loc) for x in xs]
            results = self.body(p.params["jaxpr"], q.params["jaxpr"], [*fixed, *state, *items], wanted)
            state = results[:carried]
            collected.append(results[carried:])
        if p.params["reverse"]:
            collected.reverse()
        return [*state, *(self._stacked(ys, loc) if ys[0] else "" for ys in zip(*collected, strict=True))]

    def item(self, name: str, i: int, loc: Loc) -> str:
        """The i-th piece along the first axis; of a parameter, a parameter of its own."""
        if isinstance(name, Pair):
            return Pair(*(self.item(part, i, loc) for part in name))  # type: ignore[return-value]
        type = self.graph.type(name)
        sliced = Type(type.dtype, type.shape[1:])
        source = param_slice(self.graph, name, 0, i)
        if source is not None:
            return source
        start = (i, *(0 for _ in sliced.shape))
        limit = (i + 1, *sliced.shape)
        row = self.graph.one("lax.slice", [name], Type(type.dtype, (1, *sliced.shape)), loc, start=start, limit=limit)
        return self.graph.one("lax.reshape", [row], sliced, loc, new_sizes=sliced.shape)

    def _stacked(self, items: Sequence[str], loc: Loc) -> str:
        type = self.graph.type(items[0])
        wide = Type(type.dtype, (1, *type.shape))
        rows = [self.graph.one("lax.reshape", [i], wide, loc, new_sizes=wide.shape) for i in items]
        whole = Type(type.dtype, (len(items), *type.shape))
        return self.graph.one("lax.concatenate", rows, whole, loc, dimension=0)

    def _differs(self, first: Sequence[Any], second: Sequence[Any]) -> None:
        for at, (p, q) in enumerate(zip(first, second, strict=False)):
            if p.primitive.name != q.primitive.name:
                (_, t1), (_, t2) = self.points
                raise EffcError(
                    f"{location(p)}: the program changes with the length: op {at} is {p.primitive.name} at {t1} "
                    f"tokens and {q.primitive.name} at {t2}; want one program for all lengths"
                )
        raise EffcError(f"lowering: the program changes with the length: {len(first)} and {len(second)} ops")


_INSTEAD = {
    "cond": ", which has no branches: want jnp.where, or a condition that is known when the program is traced",
    "while": ", which has no loops of unknown length: want jax.lax.scan, or fori_loop over a fixed range",
}


class _Collector(_Importer):
    """Meets captured arrays in the order of an import, and keeps those of the second trace."""

    def __init__(self, graph: Graph, points: Any) -> None:
        _Importer.__init__(self, graph, points)
        self.met: list[np.ndarray] = []

    def inner(self) -> _Importer:
        made = _Collector(Graph(), self.points)
        made.met = self.met
        return made

    def captured(self, p: np.ndarray, q: np.ndarray) -> str:
        self.met.append(q)
        return self.graph.one("const", (), Type(dtype_name(p.dtype), p.shape), value=0)

    def merge(self, p: Attr, q: Attr, loc: Loc) -> Attr:
        return p

    def size(self, p: int, q: int, where: str) -> Size:
        return p


def param_slice(graph: Graph, name: str, axis: int, i: int) -> str | None:
    """The i-th slice along `axis` of a parameter (perhaps with its layer axis moved first) as a parameter."""
    op = graph.op(name)
    if op is not None and op.kind == "lax.transpose":
        order = op.attrs["permutation"]
        if not isinstance(order, tuple) or list(order[1:]) != sorted(order[1:]) or axis != 0:  # type: ignore[type-var]
            return None
        axis, op = int(order[0]), graph.op(op.inputs[0])  # type: ignore[arg-type]
    if op is None or op.kind != "param":
        return None
    whole = graph.params[op.params["value"]]
    shape = (*whole.type.shape[:axis], *whole.type.shape[axis + 1 :])
    path = f"{whole.path}[{':,' * axis}{i}]"
    new = replace(whole, name=f"{whole.name}[{':,' * axis}{i}]", type=Type(whole.type.dtype, shape), path=path)
    graph.params[new.name] = new
    return graph.add("param", (), new.type, params={"value": new.name})[0]
