"""Values turned by a Hadamard matrix a head, and turned back by what reads them: outliers are spread, exactly.

    v = z @ u;  o = attention(q, k, v) @ w   ->   v' = z @ (u H);  o = attention(q, k, v') @ (H' w)

with H orthonormal over the dims of a head: attention adds values up, each by one number, so H passes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from effc.ir.core import Module, Op, all_ops
from effc.ir.ops import attribute
from effc.ir.rewrite import producers
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase
from effc.passes.quant.sites import sites
from effc.weights import Array, Arrays, Lazy, Store

TURNED = " turned"
"""Said of parameters in their `path`."""


@dataclass(frozen=True)
class Turn:
    """Columns of a matrix (or its bias) are turned head by head, or rows turned back."""

    dims: int
    axis: int

    def of(self, array: Array) -> Array:
        """The array after, computed in f64. A product with H and one with its transpose are one: H is symmetric."""
        last = np.moveaxis(np.asarray(array, np.float64), self.axis, -1)
        heads = last.reshape(*last.shape[:-1], -1, self.dims) @ hadamard(self.dims)
        return np.moveaxis(heads.reshape(last.shape), -1, self.axis).astype(array.dtype)


def hadamard(size: int) -> Array:
    """Orthonormal and symmetric [size,size]: Sylvester's, in blocks of the greatest power of two that divides size."""
    power = size & -size
    block = np.ones((1, 1))
    while len(block) < power:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(size // power), block / np.sqrt(power))


@dataclass(frozen=True)
class Hadamard(Pass):
    """Values of attention turned by a Hadamard matrix, folded into the linears before and behind: spreads outliers."""

    name: ClassVar[str] = "hadamard"
    phase: ClassVar[Phase] = Phase.SMOOTH
    exactness: ClassVar[Exactness] = Exactness.EXACT
    writes: ClassVar[frozenset[str]] = frozenset()

    def requires(self, module: Module) -> None:
        if not any(op.kind == "attention" for _, op in all_ops(module)):
            raise PassError(f"{self.name}: no attention in {module.name}, want one whose values can be turned")

    def run(self, module: Module, notes: Notes) -> Module:
        found = turns(module, notes)
        dims = ", ".join(sorted({str(turn.dims) for turn in found.values()}))
        notes.chose(f"{len(found)} parameters turned, heads of {dims}" if found else "no values could be turned")
        params = [module.params[name] for name in found]
        return module.with_params(*(replace(p, path=p.name + TURNED, over=None, perm=None) for p in params))

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        found = turns(before, Notes())
        return [Lazy(after.params[name], _turned(store[name], turn)) for name, turn in found.items()]


def _turned(lazy: Lazy, turn: Turn) -> Callable[[int], Arrays]:
    return lambda layer: {"": turn.of(lazy.read(layer)[""])}


def turns(module: Module, notes: Notes) -> dict[str, Turn]:
    """For each parameter that changes, how."""
    out: dict[str, Turn] = {}
    for site in sites(module, notes):
        func = module.funcs[site.func]
        made = producers(func)
        joined = made[site.value]
        mix = made.get(joined.inputs[0]) if joined.kind == "lax.reshape" else None
        if mix is None or mix.kind != "attention":
            continue
        dims = mix.out.type.shape[-1]
        assert isinstance(dims, int)  # `sites` has looked
        out |= {name: Turn(dims, -1) for role, name in site.source.params.items() if role == "bias"}
        out[site.source.params["w"]] = Turn(dims, -1 if _kn(site.source) else -2)
        out |= {op.params["w"]: Turn(dims, -2 if _kn(op) else -1) for op in site.readers}
    return out


def _kn(op: Op) -> bool:
    return attribute(op, "layout") == "kn"
