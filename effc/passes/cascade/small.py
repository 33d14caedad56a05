"""What both cascades have in common: a small model attached as a drafter is, and texts that are calibrated on."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from effc.ir.core import Decode, Module
from effc.passes.base import Exactness, Pass, PassError, Phase, option
from effc.passes.draft.attach import Draft
from effc.weights import Lazy, Store

if TYPE_CHECKING:
    from effc.passes.context import Context

AUTO = "auto"

GAMMA = 8
"""Drafts at most, where it is not measured what pays: more of them stand than where the text is the target's own."""

NEVER = -1e30
"""An alpha at which every rule defers always, until one is certified."""

LEARNT = 0.5
"""Share of --calib that a small model trained here learns from; prompts are of the rest."""


@dataclass(frozen=True)
class Cascading(Pass):
    """A small model in front of the large one; what it may say by itself is set by hand or certified."""

    phase: ClassVar[Phase] = Phase.DRAFT
    exactness: ClassVar[Exactness] = Exactness.GUARANTEED
    writes: ClassVar[frozenset[str]] = frozenset({"*"})

    kind: Literal["auto", "model", "int4", "self", "head"] = option(
        AUTO,
        "the small model: another one, a 4-bit copy, first layers, a trained head; auto: model where model is given",
    )
    model: str = option("", "checkpoint or artifact of kind=model, of the same vocabulary", file=True)
    layers: int = option(0, "layers of kind=self; 0 is a quarter of them")
    lessons: str = option(
        "", "file of prompts, one a line: kind=self and kind=head learn from the target's answers", file=True
    )
    gamma: int = option(0, "tokens drafted at most; 0 measures what pays")
    delta: float = option(0.05, "mean loss of text against the large model's that is allowed, 0 to 1")
    epsilon: float = option(0.05, "chance of the calibration that the guarantee may fail")
    loss: Literal["rouge_l", "token_f1", "agreement"] = option("rouge_l", "likeness of texts; the loss is 1 less it")
    risk: bool = option(False, "hold texts against what follows in --calib, not against the large model's")
    prompts: int = option(200, "calibration prompts")
    prompt: int = option(32, "tokens of each")
    tokens: int = option(32, "tokens generated from each; later ones are the large model's")
    curve: int = option(8, "prompts on which the report draws every rule, plain speculation and each model; 0: none")
    force: bool = option(False, "cascade even where it was measured to be slower")

    @abstractmethod
    def drafter(self) -> Draft:
        """The pass that attaches the small model."""

    @abstractmethod
    def setting(self) -> tuple[str, str]:
        """The option that says how much the small model may say: its name, and its text."""

    def __post_init__(self) -> None:
        if not self.automatic:  # what is lost is not bounded
            object.__setattr__(self, "exactness", Exactness.LOSSY)

    @property
    def automatic(self) -> bool:
        """Whether that is certified, not set by hand."""
        return self.setting()[1] == AUTO

    @property
    def small(self) -> Literal["model", "int4", "self", "head"]:
        """What the small model is."""
        if self.kind != AUTO:
            return self.kind
        return "model" if self.model else "self"

    def number(self) -> float:
        """The setting as set by hand; PassError for what is no finite number."""
        name, text = self.setting()
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise PassError(f"{self.name}: {name}={text}, want a finite number, or {AUTO} to have it certified")
        return found

    def requires(self, module: Module) -> None:
        if self.layers and self.small != "self":
            raise PassError(
                f"{self.name}: layers={self.layers} are those of kind=self, want none for kind={self.small}"
            )
        self.drafter().requires(module)
        if not self.automatic:
            self.number()
        check_texts(self, module)

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        return self.drafter().made(before, after, store)

    def arrays(self, before: Module, after: Module, store: Store, context: Context, notes: object) -> Store:
        if self.small == "model" and self.automatic:
            check_apart(self.name, Path(self.model), context)
        return self.drafter().arrays(before, after, store, context, notes)  # type: ignore[arg-type]

    def ensures(self, before: Module, after: Module) -> None:
        kept = before.params.items() <= after.params.items() and before.funcs.items() <= after.funcs.items()
        if not kept:
            raise PassError(f"{self.name}: the large model changed, want it as it was")

    def training_minutes(self) -> float:
        return self.drafter().training_minutes()

    def train(self, module: Module, store: Store, context: Context) -> Store:
        return self.drafter().train(module, store, replace(context, calib=part(self, context, learnt=True)))

    def calibrates(self) -> bool:
        return True


def with_decode(module: Module, strategy: str, **attrs: object) -> Module:
    """The module that decodes so; None takes an attribute away."""
    assert module.decode is not None
    both = {**module.decode.attrs, **attrs}
    return replace(module, decode=Decode(strategy, {k: v for k, v in both.items() if v is not None}))  # type: ignore[misc]


def part(made_by: Cascading, context: Context, *, learnt: bool) -> str | None:
    """Of --calib what a small model trained here learns from, or the rest; all of it where nothing is trained."""
    text = context.calib
    if text is None or not made_by.training_minutes() or made_by.lessons:
        return text
    cut = int(len(text) * LEARNT)
    return text[:cut] if learnt else text[cut:]


def check_texts(made_by: Cascading, module: Module) -> None:
    """PassError for texts that cannot be generated: asked before anything is trained."""
    if made_by.curve < 0:
        raise PassError(f"{made_by.name}: curve={made_by.curve}, want 0 or more prompts")
    if made_by.prompt < 1 or made_by.prompts < 1 or made_by.tokens < 2:
        raise PassError(
            f"{made_by.name}: prompts and prompt want 1 or more, tokens 2 or more: one comes with the prompt"
        )
    if not 0 < made_by.delta < 1 or not 0 < made_by.epsilon < 1:
        raise PassError(f"{made_by.name}: delta and epsilon, want more than 0 and less than 1")
    context, length = module.meta.get("context"), made_by.prompt + made_by.tokens
    if isinstance(context, int) and 0 < context < length:
        raise PassError(
            f"{made_by.name}: prompt and tokens are {length} together, want at most the context of {context}"
        )


def check_apart(name: str, small: Path, context: Context) -> None:
    """PassError where the prompts would be of the text that the small model was trained on."""
    from effc.artifact import is_artifact, read_manifest

    learnt = read_manifest(small).get("trained_on", {}) if is_artifact(small) else {}
    if context.calib is not None and hashlib.sha256(context.calib.encode()).hexdigest() in learnt.values():
        raise PassError(
            f"{name}: {small} was trained on this --calib, where it does better than on new text, so a guarantee "
            f"would not hold; want other text, or a number in place of {AUTO}"
        )


__all__ = ["AUTO", "GAMMA", "NEVER", "Cascading", "check_apart", "part", "with_decode"]
