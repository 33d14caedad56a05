"""Attach a drafter: speculative decoding whose tokens are distributed as the target's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from effc.ir.core import Attr, Decode, Module, Ref
from effc.ir.types import Quant
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase, check_rate, option
from effc.passes.draft import exits, head
from effc.passes.draft import model as beside
from effc.passes.draft.parts import PREFIX, cut
from effc.weights import Lazy, Store

if TYPE_CHECKING:
    from effc.passes.context import Context

GAMMA: Mapping[str, int] = {"lookup": 7, "model": 4, "int4": 4, "self": 3, "head": 3, "exits": 3}
"""Drafts at most, where it is not measured what pays."""

MINUTES = 12.0


@dataclass(frozen=True)
class Draft(Pass):
    """Drafts several tokens and verifies them in one call: the distribution of what is generated stays as it is."""

    name: ClassVar[str] = "draft"
    phase: ClassVar[Phase] = Phase.DRAFT
    exactness: ClassVar[Exactness] = Exactness.DISTRIBUTION_EXACT
    writes: ClassVar[frozenset[str]] = frozenset({"*"})

    kind: Literal["lookup", "model", "int4", "self", "head", "exits"] = option(
        "lookup", "what drafts: n-grams of the text so far, another model, a 4-bit copy, first layers, a trained head, "
        "exits of calm (with calm that is what lookup means too)"
    )  # fmt: skip
    gamma: int = option(0, "tokens drafted at most; 0 measures what pays, and drafts nothing where nothing does")
    model: str = option("", "checkpoint or artifact of kind=model, of the same vocabulary", file=True)
    layers: int = option(0, "layers of kind=self; 0 is a quarter of them")
    vocab: int = option(8192, "tokens that kind=self and kind=head can draft, those used most; 0 is all")
    prompts: str = option(
        "", "file of prompts, one a line: kind=self and kind=head learn from the target's answers, and are measured on "
        "the last few", file=True,
    )  # fmt: skip
    lr: float = option(0.0, "learning rate of kind=self and kind=head; 0 is 0.001, of a head 0.0005")
    force: bool = option(False, "draft even where it was measured not to pay")

    def requires(self, module: Module) -> None:
        found = module.decode.strategy if module.decode else "none"
        if found not in (("greedy", "early") if self.kind in ("lookup", "exits") else ("greedy",)):
            raise PassError(f"{self.name}: decode is {found} already, want greedy")
        if self.kind == "exits" and found != "early":
            raise PassError(f"{self.name}: kind=exits, but the module has none, want calm beside draft")
        if self.gamma < 0 or self.layers < 0 or self.vocab < 0:
            raise PassError(f"{self.name}: gamma, layers and vocab, want 0 or more")
        check_rate(self.name, self.lr)
        if (self.kind == "model") != bool(self.model):
            raise PassError(f"{self.name}: kind=model and model=PATH go together")
        if self.prompts and self.kind not in ("self", "head"):
            raise PassError(
                f"{self.name}: prompts are what kind=self and kind=head learn from, want none for kind={self.kind}"
            )
        if self.kind in ("int4", "self", "head"):
            coded = [n for n, p in module.params.items() if isinstance(p.type.dtype, Quant)]
            if coded:
                raise PassError(f"{self.name}: @{coded[0]} is quantized already, want a drafter attached before that")

    def run(self, module: Module, notes: Notes) -> Module:
        if module.decode and module.decode.strategy == "early":
            return exits.attached(module, self.gamma or GAMMA["exits"], notes)
        attrs: dict[str, Attr | Ref] = {"forward": Ref(module.forward().name), "kind": self._loop()}
        if self.kind == "head":
            module, more = head.head_attached(self.name, module, self._vocab(module)), {"verify": Ref("verify")}
        elif self.kind == "self":
            layers = self.layers or max(1, int(str(cut(self.name, module).loop.attrs["times"])) // 4)
            module, more = head.part_attached(self.name, module, layers, self._vocab(module)), {"shared": True}
        elif self.kind == "lookup":
            more = {}
        else:
            module, more = beside.attached(module, self._other(module, notes)[0], self.name), {}
        attrs |= {} if self.kind == "lookup" else {"drafter": Ref(PREFIX)}
        attrs |= more | {"gamma": self.gamma or GAMMA[self.kind]}
        if head.IDS in module.params:
            attrs["vocab"] = Ref(head.IDS)
        return replace(module, decode=Decode("speculative", attrs))

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        if self.kind in ("head", "self"):
            return head.arrays(before, after, store, self.name)
        if self.kind in ("model", "int4"):
            module, arrays = self._other(before, Notes(), store)
            return beside.arrays(module, after, arrays)
        return []

    def arrays(self, before: Module, after: Module, store: Store, context: Context, notes: Notes) -> Store:
        if self.kind == "model":
            beside.check_tokens(context.tokenizer, Path(self.model), cut_vocab(after), self.name)
        return self.weights(before, after, store)

    def training_minutes(self) -> float:
        return MINUTES if self.kind in ("head", "self") else 0.0

    def train(self, module: Module, store: Store, context: Context) -> Store:
        """Which tokens it can draft is found out first, then its arrays are fitted."""
        from effc.passes.draft import start, train  # optax, for who trains

        source = train.Source(self.kind == "head", self.asks())
        lesson, ids = train.read(self.name, module, store, context, source), None
        if head.IDS in module.params:
            count = int(str(module.params[head.IDS].type.shape[0]))
            ids = train.frequent(lesson, count, cut(self.name, module).vocab)
            store = head.with_ids(self.name, module, store, ids)
        model = context.model(module, store)
        if self.kind == "head" and train.known(model, lesson, context) is None:
            store = start.begun(self.name, module, store, lesson, context)
            model = context.model(module, store)
        return model.store(train.fit(model, lesson, ids, context, self.lr), store)

    def calibrates(self) -> bool:
        return True

    def calibrate(self, module: Module, store: Store, context: Context, notes: Notes) -> Module:
        from effc.passes.draft import plan  # it runs the model: only where that is asked for

        return plan.planned(self, module, store, context, notes)

    def asks(self) -> Path | None:
        """The file of prompts that is learned from, and measured on."""
        return Path(self.prompts) if self.prompts else None

    def _loop(self) -> str:
        return "model" if self.kind == "int4" else self.kind

    def _vocab(self, module: Module) -> int:
        """Tokens a reduced head is of; 0 where it would save little."""
        return self.vocab if 2 * self.vocab <= cut(self.name, module).vocab else 0

    def _other(self, module: Module, notes: Notes, store: Store | None = None) -> tuple[Module, Store]:
        if self.kind == "int4":
            return beside.int4(module, store)
        return beside.opened(Path(self.model))


def cut_vocab(module: Module) -> int:
    """Size of the last axis of the logits."""
    size = module.forward().result_types()[0].shape[-1]
    assert isinstance(size, int)
    return size


__all__ = ["Draft"]
