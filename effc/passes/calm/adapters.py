"""What stands between a layer in the middle and the shared head: per exit a small residual network, zero at first."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from effc.backend.heads import product
from effc.ir.core import Attr, Func, Module, Op, Param, Value
from effc.ir.types import NUMPY, Type
from effc.passes.base import PassError
from effc.passes.calm.shape import Shape
from effc.weights import Arrays, Lazy, Store

GROUP = "exits"
"""Names of the parameters begin so."""

HEAD = "exits_head"
"""The exits' own copy of the head's matrix."""

SCORE = "exit_score"
"""The classifier, one for all exits."""

WIDER = 2
"""Width inside an `mlp` adapter, in widths of the model."""


class Asked(Protocol):
    """Options of the pass."""

    @property
    def adapter(self) -> str: ...
    @property
    def measure(self) -> str: ...


def block(asked: Asked, shape: Shape, count: int, module: Module) -> tuple[list[Param], Func]:
    """Parameters of `count` exits, and the block x -> x that an exit runs (and a score, for a classifier)."""
    x = Value("x", shape.state)
    out = _Ops(shape, count, _prefix(GROUP, module))
    result = {"mlp": out.mlp, "linear": out.linear, "none": lambda x: x}[asked.adapter](x.name)
    results = [result]
    if asked.measure == "classifier":
        results.append(out.score(x.name, _prefix(SCORE, module)))
    return out.params, Func(_prefix("exit", module), (x,), tuple(out.ops), tuple(results), block=True)


class _Ops:
    """The ops of an exit as they are written down."""

    def __init__(self, shape: Shape, count: int, group: str):
        self.state, self.width, self.count, self.group = shape.state, shape.width, count, group
        self.ops, self.params = list[Op](), list[Param]()

    def mlp(self, x: str) -> str:
        """x + down(silu(gate(norm x)) * up(norm x))."""
        inner = WIDER * self.width
        norm = self.norm(x)
        gate, up = self.linear_of(norm, "gate", inner), self.linear_of(norm, "up", inner)
        silu = self.op("silu", (gate,), "silu", inner)
        return self.add(x, self.linear_of(self.op("lax.mul", (silu, up), "prod", inner), "down", self.width))

    def linear(self, x: str) -> str:
        """x + down(norm x)."""
        return self.add(x, self.linear_of(self.norm(x), "down", self.width))

    def norm(self, x: str) -> str:
        scale = self.param("norm", (self.width,))
        return self.op("norm", (x,), "norm", self.width, {"scale": scale}, {"kind": "rms", "eps": 1e-6})

    def linear_of(self, x: str, name: str, width: int) -> str:
        size = self.sizes[x]
        return self.op("linear", (x,), name, width, {"w": self.param(name, (size, width))})

    def add(self, x: str, y: str) -> str:
        return self.op("lax.add", (x, y), "sum", self.width)

    def score(self, x: str, name: str) -> str:
        """How likely it is that this exit says what the last layer will: f32[b,t,1] before the sigmoid."""
        self.params.append(Param(name, Type("f32", (self.width, 1)), 0, "zeros"))
        value = Value("score", Type("f32", (*self.state.shape[:-1], 1)))
        norm = self.op("norm", (x,), "score_norm", self.width, {}, {"kind": "rms", "eps": 1e-6})
        self.ops.append(Op("linear", (norm,), (value,), {"w": name}))
        return value.name

    def param(self, name: str, sizes: tuple[int, ...]) -> str:
        full = f"{self.group}.{name}"
        dtype = self.state.dtype
        self.params.append(Param(full, Type(dtype, sizes), self.count, _BEGUN[name]))
        return full

    @property
    def sizes(self) -> dict[str, int]:
        """Last axis of every value so far."""
        return {"x": self.width} | {op.out.name: int(str(op.out.type.shape[-1])) for op in self.ops}

    def op(
        self, kind: str, inputs: tuple[str, ...], name: str, width: int,
        params: Mapping[str, str] | None = None, attrs: Mapping[str, Attr] | None = None,
    ) -> str:  # fmt: skip
        value = Value(name, Type(self.state.dtype, (*self.state.shape[:-1], width)))
        self.ops.append(Op(kind, inputs, (value,), dict(params or {}), dict(attrs or {})))
        return name


_BEGUN = {"norm": "ones", "gate": "random", "up": "random", "down": "zeros"}
"""What arrays begin as: the whole adapter begins as nothing added."""

COPY = "copy of "


def own_head(head: Func, module: Module) -> tuple[Param, Func]:
    """A copy of the head whose matrix is a parameter of its own, and that; PassError where it ends in no product."""
    if (found := product(module, head)) is None:
        raise PassError(f"calm: head=own, want a head that ends in a matrix, and @{head.name} does not")
    old = module.params[found.linear.params["w"]]
    param = Param(_prefix(HEAD, module), old.type, 0, f"{COPY}{old.name}")
    ops = [replace(op, params={"w": param.name}) if op is found.linear else op for op in head.ops]
    return param, replace(head, name=_prefix(f"exit.{head.name}", module), ops=tuple(ops))


def made(before: Module, after: Module, store: Store) -> list[Lazy]:
    """Arrays of the parameters that were added."""
    return [Lazy(param, _reader(param, store)) for name, param in after.params.items() if name not in before.params]


def _reader(param: Param, store: Store) -> Callable[[int], Arrays]:
    if param.path.startswith(COPY):
        return store[param.path.removeprefix(COPY)].read
    shape = tuple(int(str(size)) for size in param.type.shape)
    dtype = np.dtype(NUMPY[str(param.type.dtype)])

    def read(exit: int) -> Arrays:
        if param.path == "random":
            rng = np.random.default_rng((zlib.crc32(param.name.encode()), exit))
            return {"": (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(dtype)}
        return {"": np.full(shape, param.path == "ones", dtype)}

    return read


def _prefix(name: str, module: Module) -> str:
    taken = {*module.funcs, *(p.partition(".")[0] for p in module.params)}
    while name in taken:
        name += "_"
    return name
