"""What a run of a program leaves: a record an effect, and what they come to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from effc.errors import EffcError, nearest
from effc.programs.keys import Key

LATENT, OBSERVED = "sample", "observe"


@dataclass(frozen=True)
class Record:
    """One effect. kind: sample, observe, factor, reject, param, log or return (of a nested program).

    score: log-probability under the model, or the factor; proposal: log-probability with which a sample was drawn.
    tokens, forwards: what it costs when asked alone, whatever a cache or a batch saved.
    """

    name: str
    kind: str
    value: Any
    score: float = 0.0
    proposal: float = 0.0
    tokens: int = 0
    forwards: int = 0
    dist: Any = field(default=None, repr=False, compare=False)
    hidden: bool = field(default=False, repr=False)

    @property
    def weight(self) -> float:
        """Log weight it gives the trace: target over proposal."""
        if self.score == -math.inf:
            return -math.inf
        return self.score - self.proposal if self.kind == LATENT else self.score

    def json(self) -> dict[str, Any]:
        """Its fields; values that JSON lacks as text."""
        value = self.value if isinstance(self.value, str | int | float | bool | None) else repr(self.value)
        numbers = {name: getattr(self, name) for name in ("score", "proposal", "tokens", "forwards")}
        return {"name": self.name, "kind": self.kind, "value": value} | numbers


@dataclass(frozen=True)
class Trace:
    """Records in the order made; value: what the program returned; rejected: why it did not, else None."""

    records: tuple[Record, ...]
    value: Any = None
    rejected: str | None = None
    done: bool = True
    key: Key = (0, 0)

    @cached_property
    def score(self) -> float:
        """Sum of the log-probabilities of what was sampled and observed, and of the factors; -inf if rejected."""
        return math.fsum(r.score for r in self.records) if math.isfinite(self._worst) else -math.inf

    @cached_property
    def weight(self) -> float:
        """Log importance weight: what was observed, and of what was sampled the target over the proposal."""
        return math.fsum(r.weight for r in self.records) if math.isfinite(self._worst) else -math.inf

    @property
    def _worst(self) -> float:
        return -math.inf if self.rejected is not None else min((r.score for r in self.records), default=0.0)

    @property
    def tokens(self) -> int:
        """Tokens read and made by models, all effects together."""
        return sum(r.tokens for r in self.records)

    @property
    def forwards(self) -> int:
        """Calls of a model's forward function."""
        return sum(r.forwards for r in self.records)

    @cached_property
    def sites(self) -> Mapping[str, Record]:
        """Records by name."""
        return {r.name: r for r in self.records}

    def __contains__(self, name: str) -> bool:
        return name in self.sites

    def __getitem__(self, name: str) -> Any:
        """The value of an effect; EffcError where the trace has none of that name."""
        if name not in self.sites:
            raise EffcError(f"trace: no effect '{name}', want one of {len(self.sites)}{nearest(name, self.sites)}")
        return self.sites[name].value

    def json(self) -> dict[str, Any]:
        """Everything, for a file."""
        numbers = {name: getattr(self, name) for name in ("score", "weight", "tokens", "forwards")}
        return numbers | {"rejected": self.rejected, "records": [r.json() for r in self.records]}

    def __str__(self) -> str:
        """A line an effect."""
        rows = [(r.name, r.kind, f"{r.score:.2f}", str(r.tokens), str(r.forwards), repr(r.value)) for r in self.records]
        head = ("name", "kind", "score", "tokens", "forwards", "value")
        wide = [max(len(row[i]) for row in [head, *rows]) for i in range(5)]
        return "\n".join("  ".join([*(row[i].ljust(wide[i]) for i in range(5)), row[5][:60]]) for row in [head, *rows])
