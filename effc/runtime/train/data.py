"""Token ids to batches, each a function of the seed and the step: what is resumed sees what it would have seen."""

from __future__ import annotations

import numpy as np

from effc.errors import EffcError
from effc.runtime.train.plan import Batch, Batches, Tree


def windows(ids: np.ndarray, *, length: int, rows: int, seed: int = 0, head: tuple[int, ...] = ()) -> Batches:
    """Random windows of a stream i32[n]: {tokens i32[rows,length+1], mask bool[rows,length]}.

    tokens[:, 1:] are what is to be told from tokens[:, :-1]. head is what the tokenizer puts before texts.
    """
    body = length + 1 - len(head)
    if len(ids) < body or body < 2:
        raise EffcError(f"train: a text of {len(ids)} tokens, want {body} or more for windows of {length}")
    mask = np.ones((rows, length), bool)

    def batch(step: int, params: Tree) -> Batch:
        starts = np.random.default_rng((seed, step)).integers(0, len(ids) - body + 1, rows)
        tokens = np.stack([[*head, *ids[at : at + body]] for at in starts]).astype(np.int32)
        return {"tokens": tokens, "mask": mask}

    return batch


def sequences(samples: np.ndarray, *, rows: int, seed: int = 0, mask: np.ndarray | None = None) -> Batches:
    """Rows of samples i32[n,length+1] (mask bool[n,length]: which are to be told), all seen before any comes again."""
    count = len(samples)
    kept = np.ones((count, samples.shape[1] - 1), bool) if mask is None else mask

    def batch(step: int, params: Tree) -> Batch:
        places = [_order(seed, at // count, count)[at % count] for at in range(step * rows, (step + 1) * rows)]
        return {"tokens": samples[places].astype(np.int32), "mask": kept[places]}

    return batch


def mixed(one: Batches, other: Batches, share: float, seed: int = 0) -> Batches:
    """Batches of the one, each sequence replaced by the other's in its place with the probability `share`."""

    def batch(step: int, params: Tree) -> Batch:
        first = one(step, params)
        taken = np.random.default_rng((seed, step, 2)).random(len(first["tokens"])) < share
        if not taken.any():
            return first
        second = other(step, params)
        return {name: np.where(taken[:, None], second[name], array) for name, array in first.items()}

    return batch


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
