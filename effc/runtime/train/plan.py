"""What a training run does beside its loss: budget, batch, optimizer, schedule, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax

from effc.runtime.train.budget import Budget

Tree = Any
"""Nested dicts and lists of arrays, as emitted programs take them."""

Batch = Mapping[str, Any]
"""Arrays by name, the first axis of each is the sequences: `tokens` i32[b,t+1], `mask` bool[b,t] ..."""

Batches = Callable[[int, Tree], Batch]
"""(step, parameters as they are now) -> batch; a function of these alone, so that a resumed run goes on alike."""

Metrics = dict[str, jax.Array]

COUNT = "count"
"""A metric that loss functions may give: by it the parts of an accumulated batch are weighted."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tick:
    """What a loss may know of the run; all are traced: key for draws of this step, step i32[], progress f32[] 0..1."""

    key: jax.Array
    step: jax.Array
    progress: jax.Array


Loss = Callable[[Tree, Batch, Tick], tuple[jax.Array, Metrics]]
"""(all parameters, batch, tick) -> (f32[] to minimise, scalars to show)."""


@dataclass(frozen=True)
class Plan:
    """Defaults are those of a short healing of a small model; `warmup` is in steps."""

    budget: Budget
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon (Jordan et al. 2024) steps matrices by orthogonalized momentum, as far as AdamW would; the rest by AdamW."""
    lr: float = 1e-3
    schedule: Literal["cosine", "trapezoid", "constant"] = "cosine"
    warmup: int = 20
    floor: float = 0.05
    """Share of lr that is left at the end."""
    decay: float = 0.3
    """Share of a trapezoid's run that is its slope down."""
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    """Parts that a batch is cut into along its first axis, one after the other."""
    seed: int = 0
    folder: Path | None = field(default=None, repr=False, compare=False)
    """Where checkpoints go; a run of the same plan on the same arrays goes on from the last one there."""
    every: float = field(default=60.0, repr=False, compare=False)
    """Seconds between checkpoints, more where they are large; 0 is after every step."""
    looks: int = 4
    """How often `evaluate` looks at the parameters on the way, beside before and after."""

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * self._shape(progress)

    def _shape(self, progress: float) -> float:
        if self.schedule == "cosine":
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
        if self.schedule == "trapezoid":
            return self.floor + (1 - self.floor) * min(1.0, (1 - progress) / max(self.decay, 1e-9))
        return 1.0
