"""Scales per channel moved from activations into weights, exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from effc.ir.core import Module
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase, option
from effc.passes.quant.scaling import smooth
from effc.passes.quant.sites import Folded, Site, sites
from effc.passes.quant.statistics import Statistics, statistics
from effc.passes.quant.text import calibration_tokens
from effc.weights import Array, Store

if TYPE_CHECKING:
    from effc.passes.context import Context

MADE_OF = " smoothed"
"""Said of parameters in their `path`."""


@dataclass(frozen=True)
class Smooth(Pass):
    """SmoothQuant: channels with outliers are divided in the norm or linear that makes them, multiplied where read."""

    name: ClassVar[str] = "smooth"
    phase: ClassVar[Phase] = Phase.SMOOTH
    exactness: ClassVar[Exactness] = Exactness.EXACT
    writes: ClassVar[frozenset[str]] = frozenset()

    alpha: float = option(0.5, "how much of the outliers moves into the weights: s = max|x|^alpha / max|w|^(1-alpha)")
    tokens: int = option(16384, "of text that outliers are looked for in")

    def requires(self, module: Module) -> None:
        if not 0 <= self.alpha <= 1:
            raise PassError(f"{self.name}: alpha={self.alpha:g}, want 0 to 1")

    def run(self, module: Module, notes: Notes) -> Module:
        found = sites(module, notes)
        changed = Folded(Store({}), tuple(found), _none).changed()
        notes.chose(f"{len(found)} places where a scale can move, {len(changed)} parameters")
        params = [module.params[name] for name in changed]
        return module.with_params(*(replace(p, path=p.name + MADE_OF, over=None, perm=None) for p in params))

    def reads_text(self) -> bool:
        return True

    def weights(self, before: Module, after: Module, store: Store) -> Store:
        if before == after:
            return store
        raise PassError(f"{self.name}: looks at text, want the context that has it")

    def arrays(self, before: Module, after: Module, store: Store, context: Context, notes: Notes) -> Store:
        if before == after:
            return store
        tokens, source = calibration_tokens(before, context, self.tokens)
        seen = statistics(before, store, tokens, source=source, spare=context.folder, progress=notes.chose)
        folded = Folded(store, tuple(sites(before, Notes())), _Scales(store, seen, self.alpha).of)
        return store.replace(folded.made(after), after)


def _none(site: Site, layer: int) -> Array:
    return np.ones(site.channels)


class _Scales:
    """Found once a site and layer; ones where nothing was seen."""

    def __init__(self, store: Store, seen: Statistics, alpha: float):
        self.store, self.seen, self.alpha = store, seen, alpha
        self.known: dict[tuple[str, str, int], Array] = {}

    def of(self, site: Site, layer: int) -> Array:
        """What a site's channels are divided by."""
        key = (site.func, site.value, layer)
        if key not in self.known:
            self.known[key] = self._found(site, layer)
        return self.known[key]

    def _found(self, site: Site, layer: int) -> Array:
        names = [op.params["w"] for op in site.readers]
        if not self.seen.has(names[0]):
            return np.ones(site.channels)
        upright = [op.attrs.get("layout", "kn") == "kn" for op in site.readers]
        arrays = [np.asarray(self.store[name].read(layer)[""], np.float32) for name in names]
        matrices = [w if kn else w.T for w, kn in zip(arrays, upright, strict=True)]
        return smooth(self.seen.of(names[0], layer), matrices, np.asarray(site.index), self.alpha)
