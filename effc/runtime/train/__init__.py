"""Training of emitted programs: losses, batches, and `fit`. Needs optax and orbax: pip install 'effc[train]'."""

from __future__ import annotations

from effc.runtime.train.budget import Budget
from effc.runtime.train.data import sequences, windows
from effc.runtime.train.history import Fitted, Look, Row
from effc.runtime.train.loop import fit
from effc.runtime.train.losses import Kind, cross_entropy, divergence, forward_kl, jsd, mean, reverse_kl, tvd
from effc.runtime.train.plan import COUNT, Batch, Batches, Loss, Metrics, Plan, Tick, Tree
from effc.runtime.train.tree import by_name, chosen, places

__all__ = [
    "COUNT", "Batch", "Batches", "Budget", "Fitted", "Kind", "Look", "Loss", "Metrics", "Plan", "Row", "Tick",
    "Tree", "by_name", "chosen", "cross_entropy", "divergence", "fit", "forward_kl", "jsd", "mean", "places",
    "reverse_kl", "sequences", "tvd", "windows",
]  # fmt: skip
