"""Layers that take turns on shared weights: a stack folded into a recursion."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from effc.ir.core import Module
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase, option
from effc.passes.mor import folding as folds
from effc.passes.mor import route
from effc.passes.mor.folding import Fold, find_stack
from effc.passes.mor.route import Routes
from effc.passes.mor.sharing import Folding, chosen, fold, spans
from effc.weights import Lazy, Store, nbytes

if TYPE_CHECKING:
    from effc.passes.context import Context

HEALING_MINUTES = 6.0
"""Unless --heal says otherwise."""


@dataclass(frozen=True)
class Mor(Pass):
    """Layers folded into a recursion over fewer arrays (Mixture-of-Recursions), begun from the layers' own."""

    name: ClassVar[str] = "mor"
    phase: ClassVar[Phase] = Phase.FOLD
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    writes: ClassVar[frozenset[str]] = frozenset({"repeat", "recurse", "linear", "lax.add"})

    recursions: int = option(2, "how often the shared layers run")
    share: Literal["cycle", "sequence", "middle-cycle", "middle-sequence"] = option(
        "middle-cycle", "which layers share: all or all but first and last, in a cycle or in a row"
    )
    span: str = option("auto", "first and last layer folded, as 1-10; auto takes those that cost least to fold")
    init: Literal["auto", "stepwise", "even", "average", "lower", "upper"] = option(
        "auto", "what shared arrays begin from; auto takes what costs least, average where rank is given"
    )
    rank: str = option("0", "rank of the low-rank delta each layer keeps; full is exact")
    damp: str = option("auto", "factor of the norms of layers that run an array again; auto takes what costs least")
    norms: Literal["own", "shared"] = option("own", "whether each layer keeps its vectors (norm scales, biases)")
    router: Literal["none", "expert", "token"] = option(
        "none", "who decides how often a token recurs: nobody, a router a depth, or one router at the start"
    )
    capacity: float = option(0.0, "share of the tokens that the last depth takes; 0 is one in `recursions`")
    kv: Literal["recursion", "shared"] = option(
        "recursion", "whether a depth keeps keys of its own or reads the first's"
    )
    baseline: Literal["none", "steps", "minutes"] = option(
        "none", "also train a model of as many layers as there are arrays, for as many steps or as many minutes"
    )
    uneven: bool = option(False, "leave the last layers as they are where the span does not divide")

    def requires(self, module: Module) -> None:
        fold = self.fold(module)
        if self.routes:
            route.check(self.routes, fold.folding, fold.stack.op, fold.stack.block)

    @property
    def routes(self) -> Routes | None:
        """How tokens are routed, where they are."""
        return None if self.router == "none" else Routes(self.router, self.capacity, self.kv)

    def run(self, module: Module, notes: Notes) -> Module:
        fold = self.fold(module)
        after = folds.folded(module, fold, notes)
        return route.routed(after, self.routes, fold.folding, notes) if self.routes else after

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        routers = [route.made(after.params[route.ROUTER])] if self.routes else []
        return [*folds.made(self.fold(before), after, store), *routers]

    def ensures(self, before: Module, after: Module) -> None:
        if self.rank == "0" and nbytes(after) >= nbytes(before):
            raise PassError(f"mor: {nbytes(after)} bytes of weights after, {nbytes(before)} before: nothing was saved")

    def decided(self, module: Module, store: Store, context: Context) -> Self:
        if "auto" not in (self.span, self.init, self.damp):
            return self
        from effc.passes.mor import choose

        self.requires(module)
        fold, asked = self.fold(module), read_span(self.span)
        foldings = [fold.folding] if asked else [self._folding(fold.stack.layers, s) for s in self._spans(fold)]
        starts = (fold.init,) if self.init != "auto" or fold.rank else choose.STARTS
        best = choose.choose(module, store, fold, foldings, starts, context)
        span, damp = f"{best.folding.first}-{best.folding.last - 1}", 1.0 if best.damp is None else best.damp
        return replace(self, span=span, init=best.init, damp=f"{damp:g}")

    def _spans(self, fold: Fold) -> list[tuple[int, int]]:
        """The one that `share` means first: it is taken where others are no better."""
        first = (fold.folding.first, fold.folding.last - 1)
        return [first, *(s for s in spans(fold.stack.layers, self.recursions, self.share) if s != first)]

    def _folding(self, layers: int, span: tuple[int, int] | None) -> Folding:
        return fold(layers, self.recursions, self.share, span, self.uneven)

    def training_minutes(self) -> float:
        return HEALING_MINUTES

    def train(self, module: Module, store: Store, context: Context) -> Store:
        from effc.passes.mor import heal  # optax and orbax, for who trains

        fitted, healed = heal.heal(module, store, context)
        if self.baseline != "none":
            heal.baseline(_arrays_left(module), context, fitted, same=self.baseline)
        return healed

    def calibrates(self) -> bool:
        return self.router != "none"

    def calibrate(self, module: Module, store: Store, context: Context, notes: Notes) -> Module:
        from effc.passes.mor import measure

        measure.routed(module, store, context, notes)
        return module

    def fold(self, module: Module) -> Fold:
        """What becomes of the module's layers; PassError where they cannot be folded so."""
        stack, rank = find_stack(module), read_rank(self.rank)
        folding = self._folding(stack.layers, read_span(self.span))
        return Fold(stack, folding, chosen(self.init, rank), rank, self.norms == "shared", read_damp(self.damp))


def _arrays_left(module: Module) -> int:
    """How many arrays the folded layers share."""
    orders = [op.attrs["order"] for op in module.forward().ops if "order" in op.attrs]
    return 1 + max(
        number for order in orders if isinstance(order, tuple) for number in order if isinstance(number, int)
    )


def read_rank(text: str) -> int:
    """0 for none, -1 for full."""
    if text == "full":
        return -1
    if not re.fullmatch(r"\d+", text):
        raise PassError(f"mor: rank={text}, want a whole number or full")
    return int(text)


def read_damp(text: str) -> float | None:
    """None for auto."""
    if text == "auto":
        return None
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) > 1:
        raise PassError(f"mor: damp={text}, want a factor, 0 to 1, or auto")
    return float(text)


def read_span(text: str) -> tuple[int, int] | None:
    """First and last layer; None for auto."""
    if text == "auto":
        return None
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if not found:
        raise PassError(f"mor: span={text}, want the first and the last layer, e.g. 1-10, or auto")
    return int(found[1]), int(found[2])
