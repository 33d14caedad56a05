"""Weights of linears to 4 bits, round to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from effc.ir.core import Module
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase, option
from effc.passes.weight_rules import Rules, coded, plan, recoded, shrinks
from effc.weights import Lazy, Store


@dataclass(frozen=True)
class Quant4(Pass):
    """Weights of linears to 4-bit codes, a scale per `group` summed over; embeddings and head to 8 bits a row."""

    name: ClassVar[str] = "quant4"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    writes: ClassVar[frozenset[str]] = frozenset()

    group: int = option(32, "weights that share a scale; 0 is a whole output channel")
    sym: bool = option(True, "codes around zero; false adds a zero point a group")
    scale: Literal["f16", "bf16", "f32"] = option("f16", "dtype of the scales")
    method: Literal["mse", "absmax"] = option(
        "mse", "how a scale is found: least squared error, or the greatest magnitude"
    )
    embed: Literal[8, 4, 0] = option(8, "bits for embedding tables; 0 leaves them")
    head: Literal[8, 4, 0] = option(8, "bits for the matrix that makes the logits; 0 leaves it")
    only: str = option("*", "code only parameters whose name fits this glob (a|b for several)")
    skip: str = option("", "leave parameters whose name fits this glob")

    def requires(self, module: Module) -> None:
        check_group(self.name, self.group)

    def run(self, module: Module, notes: Notes) -> Module:
        rules = Rules(self.name, 4, self.group, self.sym, self.scale, self.embed, self.head, self.only, self.skip)
        return recoded(module, plan(module, rules, notes))

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        return coded(before, after, store, self.method)

    def ensures(self, before: Module, after: Module) -> None:
        shrinks(self.name, before, after)


def check_group(name: str, group: int) -> None:
    """Raise PassError for a group that cannot be."""
    if group < 0 or group == 1:
        raise PassError(f"{name}: group={group}, want 0 (a whole channel) or 2 and more")
