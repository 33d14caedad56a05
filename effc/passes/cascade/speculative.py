"""Speculative cascades: the speculation of `draft`, towards what a deferral rule makes of both models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from effc.ir.core import Module
from effc.passes.base import Notes, option
from effc.passes.cascade.small import AUTO, GAMMA, NEVER, Cascading, with_decode
from effc.passes.draft.attach import Draft

if TYPE_CHECKING:
    from effc.passes.context import Context
    from effc.weights import Store


@dataclass(frozen=True)
class _Drafter(Draft):
    """Attached in this pass's name."""

    name: ClassVar[str] = "speccascade"


@dataclass(frozen=True)
class SpecCascade(Cascading):
    """Speculative cascade: drafts of a small model stand where a rule keeps them, unlike the large model's or not."""

    name: ClassVar[str] = "speccascade"

    rule: Literal["tokenv3", "tokenv2", "tokenv1", "opt", "diff", "chow", "lossy"] = option(
        "tokenv3", "what is kept, by the probabilities of both models; lossy is speculation with lenience, a baseline"
    )
    alpha: str = option(
        AUTO,
        "how much is kept; auto: the most certified to lose at most delta; tokenv3 is lossless below 0, not at 0",
    )
    vocab: int = option(8192, "tokens that kind=self and kind=head can draft, those used most; 0 is all")

    def setting(self) -> tuple[str, str]:
        return "alpha", self.alpha

    def drafter(self) -> Draft:
        told = {"model": self.model, "layers": self.layers, "vocab": self.vocab, "prompts": self.lessons}
        return _Drafter(kind=self.small, gamma=self.gamma, force=self.force, **told)

    def run(self, module: Module, notes: Notes) -> Module:
        after = self.drafter().run(module, notes)
        alpha = NEVER if self.automatic else self.number()
        return with_decode(after, "speculative", gamma=self.gamma or GAMMA, rule=self.rule, alpha=alpha)

    def calibrate(self, module: Module, store: Store, context: Context, notes: Notes) -> Module:
        from effc.passes.cascade import calibrate  # it runs the model: only where that is asked for

        return calibrate.by_rule(self, module, store, context, notes)


__all__ = ["SpecCascade"]
