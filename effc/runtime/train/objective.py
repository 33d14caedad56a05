"""What a student is trained for: to be near its teacher, to tell the text, or some of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from effc.errors import EffcError
from effc.runtime.train.losses import Kind, cross_entropy, divergence, mean
from effc.runtime.train.plan import COUNT, Batch, Loss, Metrics, Tick, Tree

Forward = Callable[[Tree, jax.Array], jax.Array]


@dataclass(frozen=True)
class Objective:
    """alpha * T^2 * divergence(teacher, student) + (1 - alpha) * cross entropy; at alpha 0 no teacher is asked."""

    kind: Kind = "fkl"
    alpha: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise EffcError(f"alpha {self.alpha:g}: want 0 (the text alone) to 1 (the teacher alone)")
        divergence(self.kind, beta=self.beta, temperature=self.temperature)
        if not 0 <= self.beta <= 1:
            raise EffcError(f"beta {self.beta:g}: want 0 (forward KL) to 1 (reverse KL)")

    def loss(self, teacher: Forward, student: Forward) -> Loss:
        """Over trees {"teacher": .., "student": ..}; `gold` bool[b,t], else mask, is where the text is to be told."""
        apart = divergence(self.kind, beta=self.beta, temperature=self.temperature)

        def call(tree: Tree, batch: Batch, tick: Tick) -> tuple[jax.Array, Metrics]:
            ids, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
            mask, gold = batch["mask"], batch.get("gold", batch["mask"])
            logits = student(tree["student"], ids)
            told = mean(cross_entropy(logits, targets), gold)
            metrics = {COUNT: mask.sum(), "ce": told}
            if not self.alpha:
                return told, metrics
            near = mean(apart(teacher(tree["teacher"], ids), logits), mask)
            return self.alpha * near + (1 - self.alpha) * told, {**metrics, "apart": near}

        return call
