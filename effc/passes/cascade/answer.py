"""Plain cascades: the small model speaks by itself, for whole answers or as long as it is sure of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from effc.ir.core import Module
from effc.passes.base import Notes, PassError, option
from effc.passes.cascade.small import AUTO, NEVER, Cascading, with_decode
from effc.passes.draft.attach import Draft

if TYPE_CHECKING:
    from effc.passes.context import Context
    from effc.weights import Store

GAMMA = 16
"""Tokens that the small model says before the large one reads them, at level=token."""


@dataclass(frozen=True)
class _Drafter(Draft):
    """Attached in this pass's name."""

    name: ClassVar[str] = "cascade"


@dataclass(frozen=True)
class Cascade(Cascading):
    """Cascade: a small model answers, and the large one where it was not sure: of an answer, or of a token."""

    name: ClassVar[str] = "cascade"

    level: Literal["sequence", "token"] = option("sequence", "what is kept or not: whole answers, or each token")
    confidence: Literal["mean", "min", "quantile"] = option(
        "mean",
        "of an answer, from its tokens' probabilities: their geometric mean, the least, or the tenth in a hundred",
    )
    threshold: str = option(
        AUTO, "confidence from which the small model is believed; auto: the least that is certified"
    )

    def setting(self) -> tuple[str, str]:
        return "threshold", self.threshold

    def drafter(self) -> Draft:
        gamma = self.gamma or GAMMA
        told = {"model": self.model, "layers": self.layers, "vocab": 0, "prompts": self.lessons}
        return _Drafter(kind=self.small, gamma=gamma, force=self.force, **told)

    def requires(self, module: Module) -> None:
        if self.small == "head":
            raise PassError("cascade: kind=head reads what the large model makes, want kind=model, int4 or self")
        Cascading.requires(self, module)
        if not self.automatic and not 0 <= self.number() <= 1:
            raise PassError(f"cascade: threshold={self.threshold}, want 0 (the small model always) to 1 (never)")

    def run(self, module: Module, notes: Notes) -> Module:
        after = self.drafter().run(module, notes)
        threshold = 1.0 if self.automatic else self.number()
        if self.level == "sequence":
            told = {"level": "sequence", "confidence": self.confidence, "threshold": threshold}
            return with_decode(after, "cascade", **told, gamma=None)
        # Chow's rule is the one that asks the small model alone.
        alpha = NEVER if threshold == 1 else round(1 - threshold, 9)
        return with_decode(after, "cascade", level="token", rule="chow", alpha=alpha)

    def calibrate(self, module: Module, store: Store, context: Context, notes: Notes) -> Module:
        from effc.passes.cascade import calibrate, whole  # they run the model: only where that is asked for

        settle = whole.by_threshold if self.level == "sequence" else calibrate.by_rule
        return settle(self, module, store, context, notes)


__all__ = ["Cascade"]
