"""Layers that take turns on shared weights: a stack folded into a recursion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from effc.ir.core import Module
from effc.passes import mor_fold
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase, option
from effc.passes.mor_fold import Fold, find_stack
from effc.passes.mor_sharing import chosen, fold
from effc.weights import Lazy, Store, nbytes


@dataclass(frozen=True)
class Mor(Pass):
    """Layers folded into a recursion over fewer arrays (Mixture-of-Recursions), begun from the layers' own."""

    name: ClassVar[str] = "mor"
    phase: ClassVar[Phase] = Phase.FOLD
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    writes: ClassVar[frozenset[str]] = frozenset({"repeat", "linear", "lax.add"})

    recursions: int = option(2, "how often the shared layers run")
    share: Literal["cycle", "sequence", "middle-cycle", "middle-sequence"] = option(
        "middle-cycle", "which layers share: all or all but first and last, in a cycle or in a row"
    )
    span: str = option("auto", "first and last layer folded, as 1-10; auto takes those that cost least to fold")
    init: Literal["auto", "stepwise", "average", "lower", "upper"] = option(
        "auto", "what shared arrays begin from; auto is stepwise, average where rank is given"
    )
    rank: str = option("0", "rank of the low-rank delta each layer keeps; full is exact")
    norms: Literal["own", "shared"] = option("own", "whether each layer keeps its vectors (norm scales, biases)")
    uneven: bool = option(False, "leave the last layers as they are where the span does not divide")

    def requires(self, module: Module) -> None:
        self.fold(module)

    def run(self, module: Module, notes: Notes) -> Module:
        return mor_fold.folded(module, self.fold(module), notes)

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        return mor_fold.made(self.fold(before), after, store)

    def ensures(self, before: Module, after: Module) -> None:
        if self.rank == "0" and nbytes(after) >= nbytes(before):
            raise PassError(f"mor: {nbytes(after)} bytes of weights after, {nbytes(before)} before: nothing was saved")

    def fold(self, module: Module) -> Fold:
        """What becomes of the module's layers; PassError where they cannot be folded so."""
        stack, rank = find_stack(module), read_rank(self.rank)
        folding = fold(stack.layers, self.recursions, self.share, read_span(self.span), self.uneven)
        return Fold(stack, folding, chosen(self.init, rank), rank, self.norms == "shared")


def read_rank(text: str) -> int:
    """0 for none, -1 for full."""
    if text == "full":
        return -1
    if not re.fullmatch(r"\d+", text):
        raise PassError(f"mor: rank={text}, want a whole number or full")
    return int(text)


def read_span(text: str) -> tuple[int, int] | None:
    """First and last layer; None for auto."""
    if text == "auto":
        return None
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if not found:
        raise PassError(f"mor: span={text}, want the first and the last layer, e.g. 1-10, or auto")
    return int(found[1]), int(found[2])
