"""What a training run says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from effc.runtime.train.plan import Tree

SHOWN = 100
"""Rows of a history that go into reports."""


@dataclass(frozen=True)
class Row:
    """Of one step: progress 0 to 1, its loss and other scalars; seconds and tokens since the start."""

    step: int
    progress: float
    loss: float
    lr: float
    seconds: float
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Look:
    """What `evaluate` said after so many steps."""

    step: int
    progress: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Fitted:
    """The whole tree after training; `seconds` are those of steps, with `compile_seconds` in them."""

    params: Tree
    steps: int
    seconds: float
    compile_seconds: float
    tokens: int
    history: list[Row]
    looks: list[Look]
    resumed: int = 0
    """The step that this run went on from."""
    title: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of training, compiling left out."""
        return self.tokens / max(self.seconds - self.compile_seconds, 1e-9)

    def json(self) -> dict[str, Any]:
        """Counts, looks, and about a hundred rows of the history."""
        every, last = -(-len(self.history) // SHOWN) or 1, len(self.history) - 1
        rows = [asdict(row) for i, row in enumerate(self.history) if i % every == 0 or i == last]
        own = {name: getattr(self, name) for name in ("steps", "seconds", "compile_seconds", "tokens", "resumed")}
        own["title"], own["tokens_per_second"] = self.title, self.tokens_per_second
        return own | {"looks": [asdict(look) for look in self.looks], "history": rows}
