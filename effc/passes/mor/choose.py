"""Which layers to fold and what their arrays begin from: what costs least, on text where there are no deltas yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import jax
import numpy as np

from effc.ir.core import Module
from effc.passes.base import Notes
from effc.passes.mor.folding import Fold, folded, made
from effc.passes.mor.sharing import Folding, Init
from effc.runtime.train import forward_kl, mean
from effc.weights import Lazy, Store

if TYPE_CHECKING:
    from effc.passes.context import Context, Model

SEQUENCES = 4
"""Of training text, to see what a fold costs."""

STARTS: tuple[Init, ...] = ("stepwise", "even", "lower", "upper")
"""What shared arrays may begin from where nothing makes up for the difference."""

DAMPED = (1.0, 0.7, 0.5)
"""Factors of the norms of layers that run an array again."""

T = TypeVar("T")


def choose(
    module: Module, store: Store, fold: Fold, foldings: list[Folding], starts: tuple[Init, ...], context: Context
) -> Fold:
    """The cheapest start for the fold given, then the cheapest of the foldings with it, then of what damps it."""
    if fold.rank:  # deltas hide what layers differ by, and cost what they do not share
        return replace(fold, folding=max(foldings, key=lambda folding: likeness(fold, folding, store)))
    cost = _cost(module, store, context)
    fold = least((replace(fold, init=start) for start in starts), cost)
    fold = least((replace(fold, folding=folding) for folding in foldings), cost)
    damped = DAMPED if fold.damp is None and fold.stream_norms() else (fold.damp,)
    return least((replace(fold, damp=damp) for damp in damped), cost)


def least(found: Iterable[T], cost: Callable[[T], float]) -> T:
    """The one that costs least, asked only where there is a choice; the first of equals."""
    listed = list(found)
    return min(listed, key=cost) if len(listed) > 1 else listed[0]


def likeness(fold: Fold, folding: Folding, store: Store) -> float:
    """Mean cosine of the matrices of layers that would share one."""
    groups = [layers for layers in folding.sources("average") if len(layers) > 1]
    matrices = [p.name for p in fold.stack.params if len(p.type.shape) > 1]
    return float(np.mean([_cosine(store[name], layers) for name in matrices for layers in groups]))


def _cosine(lazy: Lazy, layers: tuple[int, ...]) -> float:
    """Of all pairs, from the sum of the directions: |sum|^2 = n + pairs."""
    total, n = np.zeros(()), len(layers)
    for layer in layers:
        array = lazy.read(layer)[""].astype(np.float64)
        total = total + array / max(float(np.linalg.norm(array)), 1e-30)
    return (float(np.sum(np.square(total))) - n) / (n * (n - 1))


def _cost(module: Module, store: Store, context: Context) -> Callable[[Fold], float]:
    """KL to the module as it is, nats a token of some training text."""
    before = context.model(module, store)
    ids = context.batches(SEQUENCES)(0, None)["tokens"][:, :-1]

    def cost(fold: Fold) -> float:
        after = folded(module, fold, Notes())
        arrays = store.replace(made(fold, after, store), after)
        return gap(before, context.model(after, arrays), ids)

    return cost


def gap(one: Model, two: Model, ids: np.ndarray) -> float:
    """KL of the second from the first on tokens i32[n,t]."""
    apart = jax.jit(lambda p, q, x: mean(forward_kl(one.program.forward(p, x), two.program.forward(q, x))))
    return float(apart(one.params, two.params, ids))
