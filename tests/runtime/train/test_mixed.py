"""Batches of two texts, mixed sequence by sequence."""

from __future__ import annotations

import numpy as np

from effc.runtime.train.data import mixed, sequences
from effc.runtime.train.plan import Batch, Tree

ZEROS, ONES = (np.full((8, 6), number, np.int32) for number in (0, 1))


def unread(step: int, params: Tree) -> Batch:
    raise AssertionError("read, though none of it was wanted")


def test_so_large_a_share_of_sequences_is_the_others() -> None:
    batches = mixed(sequences(ZEROS, rows=4), sequences(ONES, rows=4), 0.25)
    seen = np.concatenate([batches(step, None)["tokens"] for step in range(200)])
    assert set(seen.mean(axis=1)) == {0.0, 1.0}  # whole sequences
    assert 0.2 < seen.mean() < 0.3
    assert seen.dtype == np.int32


def test_the_same_step_gives_the_same_batch() -> None:
    batches = mixed(sequences(ZEROS, rows=4), sequences(ONES, rows=4), 0.5, seed=3)
    np.testing.assert_array_equal(batches(7, None)["tokens"], batches(7, None)["tokens"])


def test_what_is_not_wanted_is_not_made() -> None:
    batches = mixed(sequences(ZEROS, rows=4), unread, 0.0)
    assert batches(0, None)["mask"].dtype == bool
