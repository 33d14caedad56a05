"""Codes of matrices made with the statistics of their inputs: GPTQ, AWQ, or both, and what they cost each output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from effc.ir.core import Module, Param, param_uses
from effc.ir.types import Quant
from effc.passes.base import Notes
from effc.passes.quant.clipping import clipped
from effc.passes.quant.gptq import gptq
from effc.passes.quant.scaling import awq, output_error
from effc.passes.quant.sites import Folded, Site, sites
from effc.passes.quant.statistics import Seen, Statistics
from effc.passes.quantizer import Method, checked, code, quantize, rounded, spread, stored
from effc.passes.weight_rules import tell_errors
from effc.weights import Array, Arrays, Lazy, Store


@dataclass(frozen=True)
class How:
    """Which methods, and how the scales of groups are found where text is looked at."""

    gptq: bool
    awq: bool
    ordered: bool
    scaling: Method


@dataclass
class Coder:
    """Makes the arrays of `after`, whose types say what is coded and how."""

    how: How
    before: Module
    after: Module
    store: Store
    seen: Statistics
    notes: Notes
    quants: Mapping[str, Quant] = field(init=False)
    errors: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def __post_init__(self) -> None:
        self.quants = changed(self.before, self.after)
        uses = param_uses(self.before)
        self.tables = {name for name in self.quants if any(role == "table" for _, _, role in uses[name])}
        found = [site for site in sites(self.before, Notes()) if self._useful(site)] if self.how.awq else []
        self.folded = Folded(self.store, tuple(found), self._scales)
        self._known: dict[tuple[str, str, int], Array] = {}

    def made(self) -> list[Lazy]:
        """Everything that changes, computed as it is read."""
        dense = [lazy for lazy in self.folded.made(self.after) if lazy.param.name not in self.quants]
        return [*dense, *(Lazy(self.after.params[name], partial(self._coded, name)) for name in self.quants)]

    def _useful(self, site: Site) -> bool:
        return all(op.params["w"] in self.quants and self.seen.has(op.params["w"]) for op in site.readers)

    def _scales(self, site: Site, layer: int) -> Array:
        """Found once a site and layer."""
        key = (site.func, site.value, layer)
        if key not in self._known:
            names = [op.params["w"] for op in site.readers]
            matrices = [(self._upright(n, self.store[n].read(layer)[""]), self._rounds(n)) for n in names]
            self._known[key] = awq(self.seen.of(names[0], layer), matrices, np.asarray(site.index))[0]
        return self._known[key]

    def _rounds(self, name: str) -> Callable[[Array, Array], Array]:
        quant = replace(self.quants[name], axis=-2)
        return lambda w, importance: rounded(w, quant, self.how.scaling, importance)

    def _upright(self, name: str, array: Array) -> Array:
        """w[K,N], f32."""
        upright = self.quants[name].axis == -2
        return np.ascontiguousarray(array if upright else array.T, np.float32)

    def _coded(self, name: str, layer: int) -> Arrays:
        param, quant = self.after.params[name], self.quants[name]
        where = f"{name}[{layer}]" if param.stack else name
        array = checked(self.folded.read(name, layer), where)
        if name in self.tables or not self.seen.has(name):
            return quantize(array, quant, self.how.scaling, where)
        w, square = self._upright(name, array), self._square(name, layer)
        codes, scales, zeros = self._codes(w, square, replace(quant, axis=-2))
        self._note(param, w, spread(codes, scales, zeros, quant.group) - w, square)
        shape = w.shape if quant.axis == -2 else w.T.shape
        return stored(codes if quant.axis == -2 else codes.T, scales, zeros, quant, shape, where)

    def _square(self, name: str, layer: int) -> Array:
        """x'x of the input after folding."""
        square = self.seen.of(name, layer).square
        for site in self.folded.sites:
            if any(op.params["w"] == name for op in site.readers):
                s = self.folded.factor(site, layer).astype(np.float32)
                square = square / s[:, None] / s[None]
        return square

    def _codes(self, w: Array, square: Array, quant: Quant) -> tuple[Array, Array, Array]:
        if self.how.gptq:
            return gptq(w, square, quant, self.how.scaling, ordered=self.how.ordered)
        if self.how.scaling == "mse":
            return clipped(w, square, quant, self.how.scaling)
        return code(w, quant, self.how.scaling, np.diagonal(square).copy())

    def _note(self, param: Param, w: Array, wrong: Array, square: Array) -> None:
        """How far outputs are off, as a share of their own size."""
        errors = self.errors.setdefault(param.name, [])
        errors.append(float(np.sqrt(output_error(wrong, square) / max(output_error(w, square), 1e-30))))
        tell_errors(self.notes, param, errors, "outputs")


def changed(before: Module, after: Module) -> dict[str, Quant]:
    """Parameters whose dtype became a coded one."""
    return {
        name: p.type.dtype
        for name, p in after.params.items()
        if isinstance(p.type.dtype, Quant) and p.type != before.params[name].type
    }


__all__ = ["Coder", "How", "Seen", "changed"]
