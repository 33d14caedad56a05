"""What the passes that code weights have in common: options, and where their arrays come from."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from effc.ir.core import Module
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase, option
from effc.passes.quant.coding import Coder, How
from effc.passes.quant.rules import parse_rules
from effc.passes.quant.spans import Came
from effc.passes.quant.statistics import statistics
from effc.passes.quant.text import calibration_tokens
from effc.passes.quantizer import Method
from effc.passes.weight_rules import Rules, bytes_by_dtype, coded, plan, recoded, shrinks
from effc.weights import Lazy, Store

if TYPE_CHECKING:
    from effc.passes.context import Context

TOKENS = 16384
"""Of text that weights are fitted to: some thirty windows."""


@dataclass(frozen=True)
class WeightPass(Pass, ABC):
    """Codes the weights of linears, embeddings and the head; passes differ in `width` and in defaults."""

    phase: ClassVar[Phase] = Phase.QUANTIZE
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    writes: ClassVar[frozenset[str]] = frozenset()
    width: ClassVar[int]

    group: int = option(32, "weights that share a scale; 0 is a whole output channel")
    sym: bool = option(True, "codes around zero; false adds a zero point a group")
    scale: Literal["f16", "bf16", "f32"] = option("f16", "dtype of the scales")
    method: Literal["mse", "absmax", "percentile", "gptq", "awq", "awq+gptq"] = option(
        "mse",
        "greatest magnitude, percentile, least squared error; or fitted to text (--calib): gptq, awq, awq+gptq",
    )
    clip: bool = option(True, "gptq, awq: search how far to cut a group's extremes; false reaches them all")
    act_order: bool = option(False, "gptq: inputs that are largest in the text come first")
    tokens: int = option(TOKENS, "gptq, awq: tokens of text to fit to")
    embed: Literal[8, 7, 6, 5, 4, 3, 2, 0] = option(8, "bits for embedding tables; 0 leaves them")
    head: Literal[8, 7, 6, 5, 4, 3, 2, 0] = option(8, "bits for the matrix that makes the logits; 0 leaves it")
    rules: str = option("", "by name or use, first match wins: '*.down:8;@head:4/64;layers.attn.*:4/32a;*.o:keep'")
    only: str = option("*", "code only parameters whose name fits this glob (a|b for several)")
    skip: str = option("", "leave parameters whose name fits this glob")

    def requires(self, module: Module) -> None:
        if self.group < 0 or self.group == 1:
            raise PassError(f"{self.name}: group={self.group}, want 0 (a whole channel) or 2 and more")
        if self.tokens < 2:
            raise PassError(f"{self.name}: tokens={self.tokens}, want 2 or more")

    def run(self, module: Module, notes: Notes) -> Module:
        after = recoded(module, plan(module, self.asked(), notes))
        notes.chose(f"{bytes_by_dtype(module)} -> {bytes_by_dtype(after)}")
        return after

    def asked(self) -> Rules:
        """The options as the planner takes them."""
        rules = parse_rules(f"{self.name}: rules", self.rules)
        return Rules(
            self.name,
            self.width,
            self.group,
            self.sym,
            self.scale,
            self.embed,
            self.head,
            self.only,
            self.skip,
            rules,
            self.asked_form(),
        )

    def asked_form(self) -> str:
        """What the codes are where no rule says so."""
        return "int"

    def reads_text(self) -> bool:
        return self.fitted()

    def fitted(self) -> bool:
        """Whether the arrays depend on text."""
        return self.method not in get_args(Method)

    def prepared(self, before: Module, store: Store) -> tuple[Module, Store, Came]:
        """What is coded: the module, perhaps in pieces, its arrays, and which array each came from."""
        return before, store, {}

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        return self._rounded(before, after, store, None)

    def _rounded(self, before: Module, after: Module, store: Store, notes: Notes | None) -> list[Lazy]:
        """Without text."""
        if self.fitted():
            raise PassError(f"{self.name}: method={self.method} looks at text, want the context that has it")
        middle, cut, came = self.prepared(before, store)
        done = coded(middle, after, cut, self.method, notes)  # type: ignore[arg-type]
        left = came.keys() - {lazy.param.name for lazy in done}
        return [*done, *(cut[name] for name in left)]

    def arrays(self, before: Module, after: Module, store: Store, context: Context, notes: Notes) -> Store:
        if before == after:
            return store
        if not self.fitted():
            return store.replace(self._rounded(before, after, store, notes), after)
        how = How("gptq" in self.method, "awq" in self.method, self.act_order, "mse" if self.clip else "absmax")
        tokens, source = calibration_tokens(before, context, self.tokens)
        seen = statistics(before, store, tokens, source=source, spare=context.folder, progress=notes.chose)
        middle, cut, came = self.prepared(before, store)
        return cut.replace(Coder(how, middle, after, cut, seen.renamed(came), notes).made(), after)

    def ensures(self, before: Module, after: Module) -> None:
        shrinks(self.name, before, after)
