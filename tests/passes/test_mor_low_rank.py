"""Low-rank deltas: the nearest ones there are, nearer the more rank they have."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from effc.passes.mor.low_rank import low_rank


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_error_is_the_root_of_the_singular_values_left_out(rows: int, columns: int, seed: int) -> None:
    residual = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    singular = np.linalg.svd(residual, compute_uv=False)
    errors = []
    for rank in range(max(rows, columns) + 2):
        b, a = low_rank(residual, rank)
        assert (b.shape, a.shape) == ((rows, rank), (rank, columns))
        errors.append(float(np.linalg.norm(residual - b @ a)))
        assert abs(errors[-1] - np.sqrt((singular[rank:] ** 2).sum())) < 1e-4
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(errors))
    assert errors[min(rows, columns)] < 1e-4
