"""Linears that read one value become one linear; norm scales move into the linears behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effc.ir.core import Module
from effc.passes import fold_norms, join_linears
from effc.passes.base import Exactness, Notes, Pass, Phase, option
from effc.weights import Lazy, Store


@dataclass(frozen=True)
class Fuse(Pass):
    """Joins linears that read one value (q/k/v, gate/up), and folds norm scales into dense linears."""

    name: ClassVar[str] = "fuse"
    phase: ClassVar[Phase] = Phase.FUSE
    exactness: ClassVar[Exactness] = Exactness.EXACT
    writes: ClassVar[frozenset[str]] = frozenset({"linear", "split", "norm"})

    norms: bool = option(True, "multiply norm scales into the linears that read the norm")

    def run(self, module: Module, notes: Notes) -> Module:
        folded = fold_norms.run(module, notes) if self.norms else module
        return join_linears.run(folded, notes)

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        quiet = Notes()
        folded = fold_norms.run(before, quiet) if self.norms else before
        new = {lazy.param.name: lazy for lazy in fold_norms.made(before, store)} if self.norms else {}
        middle = Store({**store.entries, **new})
        joined = join_linears.made(folded, middle)
        return [*(lazy for name, lazy in new.items() if name in after.params), *joined]
