"""Weights of linears to 8 bits, round to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from effc.ir.core import Module
from effc.passes.base import Exactness, Notes, Pass, Phase, option
from effc.passes.quant4 import check_group
from effc.passes.weight_rules import Rules, coded, plan, recoded, shrinks
from effc.weights import Lazy, Store


@dataclass(frozen=True)
class Quant8(Pass):
    """Weights of linears, embeddings and head to 8-bit codes, a scale per output channel (or per `group`)."""

    name: ClassVar[str] = "quant8"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    writes: ClassVar[frozenset[str]] = frozenset()

    group: int = option(0, "weights that share a scale; 0 is a whole output channel")
    sym: bool = option(True, "codes around zero; false adds a zero point a group")
    scale: Literal["f32", "f16", "bf16"] = option("f32", "dtype of the scales")
    method: Literal["absmax", "mse"] = option(
        "absmax", "how a scale is found: the greatest magnitude, or least squared error"
    )
    embed: Literal[8, 0] = option(8, "bits for embedding tables; 0 leaves them")
    head: Literal[8, 0] = option(8, "bits for the matrix that makes the logits; 0 leaves it")
    only: str = option("*", "code only parameters whose name fits this glob (a|b for several)")
    skip: str = option("", "leave parameters whose name fits this glob")

    def requires(self, module: Module) -> None:
        check_group(self.name, self.group)

    def run(self, module: Module, notes: Notes) -> Module:
        rules = Rules(self.name, 8, self.group, self.sym, self.scale, self.embed, self.head, self.only, self.skip)
        return recoded(module, plan(module, rules, notes))

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        return coded(before, after, store, self.method)

    def ensures(self, before: Module, after: Module) -> None:
        shrinks(self.name, before, after)
