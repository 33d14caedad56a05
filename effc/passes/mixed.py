"""Weights to as many bits as their sensitivity deserves, within a budget."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from effc.ir.core import Module
from effc.ir.types import Quant, evaluate
from effc.passes.base import Notes, PassError, option
from effc.passes.quant.budget import Choice, spend
from effc.passes.quant.options import WeightPass
from effc.passes.quant.rules import first
from effc.passes.quant.sensitivity import Sensitivity, harms, nbytes, sensitivity
from effc.passes.quant.spans import Came, Cut, cut, loops, outstanding, parse_cuts, spell_cuts, stacked
from effc.passes.quant.statistics import Statistics, statistics
from effc.passes.quant.text import calibration_tokens
from effc.passes.weight_rules import bytes_by_dtype, fitting_group, kinds, plan, recoded, summarize
from effc.weights import Store

if TYPE_CHECKING:
    from effc.passes.context import Context

FORMS = (
    *((3, 64), (3, 32), (3, 16)),
    *((4, 128), (4, 64), (4, 32), (4, 16)),
    *((5, 64), (5, 32), (6, 128), (6, 32), (6, 0), (8, 128), (8, 0)),
    *((8, 32), (8, 16)),
)
"""Bits and group that a parameter may get; 0 is a whole channel."""

MEASURED = (4, 32)
"""What sensitivity is measured at."""


@dataclass(frozen=True)
class Mixed(WeightPass):
    """Each parameter in 3 to 8 bits and groups of 16 to 128: measures what hurts, then spends `bits` a weight."""

    name: ClassVar[str] = "mixed"
    width: ClassVar[int] = 4
    writes: ClassVar[frozenset[str]] = frozenset({"*"})

    bits: float = option(4.5, "bits a weight to spend over all that is coded, scales included")
    cut: str = option("", "layers at which weights begin to be coded otherwise: layer:1+11; found where not given")
    probe: int = option(1024, "tokens of text that sensitivity is measured on")
    method: Literal["mse", "absmax", "percentile", "gptq", "awq", "awq+gptq"] = option("gptq", "as of quant4")

    def reads_text(self) -> bool:
        return True

    def run(self, module: Module, notes: Notes) -> Module:
        """Without arrays every weight is taken to be as sensitive as any other."""
        module, first_notes = self._cut(module).module, Notes()
        quants = plan(module, self.asked(), first_notes)
        notes.skips += first_notes.skips
        open_ = self._open(module, quants)
        if open_:
            notes.chose("sensitivity is not measured yet: all weights are taken to hurt alike")
            alike = {n: [_steps(q) * _weights(module, n) for q in forms] for n, forms in open_.items()}
            quants |= self._spent(module, quants, open_, alike)
        summarize(module, quants, notes)
        after = recoded(module, quants)
        notes.chose(f"{bytes_by_dtype(module)} -> {bytes_by_dtype(after)}")
        return after

    def prepared(self, before: Module, store: Store) -> tuple[Module, Store, Came]:
        cut_ = self._cut(before)
        return cut_.module, cut_.store(store), cut_.came

    def decided(self, module: Module, store: Store, context: Context) -> Self:
        """With a rule for every parameter, and stacks cut where layers differ."""
        self.requires(module)
        self.run(module, Notes())  # what cannot be is told before anything is measured
        quants, notes = plan(module, replace(self.asked(), rules=()), Notes()), Notes()
        tokens, source = calibration_tokens(module, context, self.tokens)
        seen = statistics(module, store, tokens, source=source, spare=context.folder)
        at = {name: _form(quant, module, name, MEASURED) for name, quant in quants.items()}
        blocks = {block: [n for n in stacked(module, block) if n in at] for block in loops(module)}
        blocks = {block: names for block, names in blocks.items() if names}
        known = sensitivity(module, store, at, blocks, tokens[: max(1, self.probe // tokens[0].size)], notes.chose)
        cuts = parse_cuts(f"{self.name}: cut", self.cut) or {b: outstanding(known.layers[b]) for b in blocks}
        made_by = replace(self, cut=spell_cuts(cuts))
        return replace(made_by, rules=made_by._chosen(module, store, seen, known, blocks))

    def _chosen(
        self, module: Module, store: Store, seen: Statistics, known: Sensitivity, blocks: Mapping[str, Sequence[str]]
    ) -> str:
        """The rules as they were given, and one for every parameter that none of them speaks of."""
        after, its_store, came = self.prepared(module, store)
        seen, quants = seen.renamed(came), plan(after, self.asked(), Notes())
        open_ = self._open(after, quants)
        block_of = {name: block for block, names in blocks.items() for name in names}
        harm, read_by = dict[str, list[float]](), kinds(after, open_)
        for name, forms in open_.items():
            param, (old, start) = after.params[name], came.get(name, (name, 0))
            cost = known.harm[old]
            if old in block_of:
                cost = known.of_span(old, block_of[old], range(start, start + param.stack))
            fits = "gptq" in self.method and "@embed" not in read_by[name]  # tables are rounded
            harm[name] = harms(its_store, param, forms, (known.at[old], cost), seen, fits)
        chosen = self._spent(after, quants, open_, harm)
        return ";".join([*filter(None, [self.rules]), *(_rule(name, quant) for name, quant in chosen.items())])

    def _cut(self, module: Module) -> Cut:
        where = f"{self.name}: cut"
        return cut(where, module, parse_cuts(where, self.cut))

    def _open(self, module: Module, quants: Mapping[str, Quant]) -> dict[str, list[Quant]]:
        """What each parameter may become that no rule speaks of."""
        rules, read_by = self.asked().rules, kinds(module, quants)
        return {
            name: list(dict.fromkeys(_form(quant, module, name, form) for form in FORMS))
            for name, quant in quants.items()
            if first(rules, name, read_by[name]) is None
        }

    def _spent(
        self, module: Module, quants: Mapping[str, Quant], open_: Mapping[str, Sequence[Quant]],
        harm: Mapping[str, Sequence[float]],
    ) -> dict[str, Quant]:  # fmt: skip
        """The coding of each parameter within the budget; PassError where nothing fits."""
        choices = {
            name: [Choice(str(i), nbytes(module.params[name], q), harm[name][i]) for i, q in enumerate(forms)]
            for name, forms in open_.items()
        }
        fixed = sum(nbytes(module.params[name], q) for name, q in quants.items() if name not in open_)
        total = sum(_weights(module, name) for name in quants)
        budget = int(self.bits * total / 8) - fixed
        least = sum(min(c.nbytes for c in own) for own in choices.values())
        if least > budget:
            lowest = 8 * (least + fixed) / max(total, 1)
            raise PassError(f"{self.name}: bits={self.bits:g}, want {lowest:.2f} or more: that is the least it can be")
        return {name: open_[name][int(choice.form)] for name, choice in spend(choices, budget).items()}


def _weights(module: Module, name: str) -> int:
    param = module.params[name]
    return param.count * evaluate(param.type.size(), {})


def _steps(quant: Quant) -> float:
    """The square of a step, as it is with weights that are spread like a bell: wider groups reach further."""
    return 4.0**-quant.bits * (1 + (quant.group or 512) ** 0.5 / 8)


def _form(quant: Quant, module: Module, name: str, form: tuple[int, int]) -> Quant:
    bits, group = form
    extent = module.params[name].type.shape[quant.axis]
    assert isinstance(extent, int)
    return replace(quant, bits=bits, group=fitting_group(extent, group))


def _rule(name: str, quant: Quant) -> str:
    return f"{glob.escape(name)}:{quant.bits}/{quant.group}"
