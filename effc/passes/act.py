"""Activations to codes: what linears read is rounded, a scale a token, or one found on text (w8a8, w4a8)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from effc.ir.core import Func, Module, Op, Param, Value, param_uses
from effc.ir.rewrite import names_of, producers, replace_ops
from effc.ir.types import Type
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase, option
from effc.passes.quant.statistics import Statistics, statistics
from effc.passes.quant.text import calibration_tokens
from effc.passes.weight_rules import SMALL, head_params
from effc.weights import Arrays, Lazy, Store

if TYPE_CHECKING:
    from effc.passes.context import Context


FAST = 128
"""Numbers to a scale, at most, that native products round by themselves; a multiple of 4."""


@dataclass(frozen=True)
class Place:
    """A value that linears read, and one of their matrices."""

    func: str
    value: str
    weight: str

    @property
    def scale(self) -> str:
        """The parameter that holds its scale, beside the matrices of its layer."""
        group, dot, _ = self.weight.rpartition(".")
        return f"{group.partition('.')[0]}{dot and '.'}act.{re.sub(r'[^A-Za-z0-9_]', '_', self.value)}"


@dataclass(frozen=True)
class Act8(Pass):
    """What linears read, but for the head and routers, rounded to `bits`: with quant8 w8a8, with quant4 w4a8."""

    name: ClassVar[str] = "act8"
    phase: ClassVar[Phase] = Phase.FUSE
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    writes: ClassVar[frozenset[str]] = frozenset({"fake_quant", "linear"})

    bits: int = option(8, "of a code, 2 to 8")
    scale: Literal["token", "static"] = option("token", "one found for each token as it comes, or one found on --calib")
    group: int = option(0, "of scale=token: numbers that share a scale; 0 is all of a token; 32 is fast on CPUs")
    tokens: int = option(16384, "of text that static scales are found on")

    def requires(self, module: Module) -> None:
        if not 2 <= self.bits <= 8:
            raise PassError(f"{self.name}: bits={self.bits}, want 2 to 8")
        if self.group < 0 or (self.group and self.scale == "static"):
            raise PassError(f"{self.name}: group={self.group} with scale={self.scale}, want 0 or more, of scale=token")
        if not readers(module):
            raise PassError(f"{self.name}: {module.name} has no linears of {SMALL} outputs or more, want some")

    def run(self, module: Module, notes: Notes) -> Module:
        found, wanted = list(places(module)), readers(module)
        params = [_scale(module, place) for place in found] if self.scale == "static" else []
        module = module.with_params(*params)
        for func in {place.func: None for place in found}:
            mine = {place.value: place for place in found if place.func == func}
            module = module.with_func(self._rounded(module.funcs[func], mine, wanted))
        how = "a scale found on text" if self.scale == "static" else "a scale a token"
        how = f"a scale for each {self.group} of a token" if self.group else how
        notes.chose(f"{len(found)} values that linears read are rounded to {self.bits} bits, {how}")
        if not (self.bits == 8 and 0 < self.group <= FAST and self.group % 4 == 0):
            notes.chose("such values run through the same kernels as floats, no faster on CPUs: want bits=8,group=32")
        elif self.group != 32:
            notes.chose(f"faster on CPUs where {self.group} divides the group of the weights that read them")
        return module

    def _rounded(self, func: Func, mine: Mapping[str, Place], wanted: Collection[str]) -> Func:
        """A `fake_quant` in front of the first linear that reads each value; linears read what it gives."""
        types, fresh, made = func.types(), names_of(func), dict[str, str]()

        def one(op: Op) -> list[Op] | None:
            place = mine.get(op.inputs[0]) if op.kind == "linear" and op.params["w"] in wanted else None
            if place is None:
                return None
            before = list[Op]()
            if place.value not in made:
                made[place.value] = fresh.fresh(f"{place.value}_q")
                before.append(self._op(place, Value(made[place.value], types[place.value]), op))
            return [*before, replace(op, inputs=(made[place.value], *op.inputs[1:]))]

        return replace_ops(func, one)

    def _op(self, place: Place, out: Value, near: Op) -> Op:
        params = {"scale": place.scale} if self.scale == "static" else {}
        attrs = {"bits": self.bits} | ({"group": self.group} if self.group else {})
        return Op("fake_quant", (place.value,), (out,), params, attrs, {}, near.loc)

    def reads_text(self) -> bool:
        return self.scale == "static"

    def weights(self, before: Module, after: Module, store: Store) -> Store:
        if self.scale == "static" and before != after:
            raise PassError(f"{self.name}: scale=static looks at text, want the context that has it")
        return store

    def arrays(self, before: Module, after: Module, store: Store, context: Context, notes: Notes) -> Store:
        if self.scale != "static" or before == after:
            return store
        tokens, source = calibration_tokens(before, context, self.tokens)
        seen = statistics(before, store, tokens, source=source, spare=context.folder, progress=notes.chose)
        made = [Lazy(after.params[place.scale], self._found(place, seen)) for place in places(before)]
        return store.replace(made, after)

    def _found(self, place: Place, seen: Statistics) -> Callable[[int], Arrays]:
        """The greatest magnitude in the text reaches half a step past the last code."""

        def read(layer: int) -> Arrays:
            most = float(seen.of(place.weight, layer).peak.max())
            return {"": np.full(1, max(most, 1e-12) / ((1 << self.bits - 1) - 0.5), np.float32)}

        return read


def readers(module: Module) -> frozenset[str]:
    """Matrices of the linears whose inputs are rounded."""
    head, uses = head_params(module), param_uses(module)
    return frozenset(
        name
        for name, found in uses.items()
        if name not in head and all(op.kind == "linear" and role == "w" and _wide(op) for _, op, role in found)
    )


def _wide(op: Op) -> bool:
    """Whether it is no router or gate."""
    width = op.out.type.shape[-1]
    return not isinstance(width, int) or width >= SMALL


def places(module: Module) -> Iterator[Place]:
    """Values that are rounded, each once, in the order they are read."""
    wanted = readers(module)
    for func in module.funcs.values():
        seen, made = dict[str, str](), producers(func)
        for op in func.ops:
            rounded = op.inputs and op.inputs[0] in made and made[op.inputs[0]].kind == "fake_quant"
            if op.kind == "linear" and op.params["w"] in wanted and not rounded:
                seen.setdefault(op.inputs[0], op.params["w"])
        yield from (Place(func.name, value, weight) for value, weight in seen.items())


def _scale(module: Module, place: Place) -> Param:
    """One number, one a layer where the matrix has one a layer."""
    near = module.params[place.weight]
    return Param(place.scale, Type("f32", (1,)), near.stack, f"greatest input of {place.weight}")
