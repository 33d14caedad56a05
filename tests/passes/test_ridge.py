"""Sums of rows: solved as all rows at once would be."""

from __future__ import annotations

import numpy as np
import pytest

from effc.passes.ridge import BLOCK, RIDGE, Sums


@pytest.mark.parametrize("bias", [None, np.arange(3, dtype=np.float32)])
def test_rows_in_parts_are_one_regression(bias: np.ndarray | None) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BLOCK + 70, 5)).astype(np.float32)
    y = x @ rng.standard_normal((5, 3)) + 0.1 * rng.standard_normal((len(x), 3)) + (0 if bias is None else bias)
    sums = Sums.of(x[:50], y[:50]) + Sums.of(x[50:], y[50:])
    found, left = sums.solved(bias)

    wanted = y if bias is None else y - bias
    inner = x.T @ x + RIDGE * np.square(x).mean() * len(x) * np.eye(5)
    np.testing.assert_allclose(found, np.linalg.solve(inner, x.T @ wanted), atol=1e-4)
    assert sums.rows == len(x)
    np.testing.assert_allclose(left * np.square(y).sum(), _left(y, wanted, x @ found), rtol=1e-3)


def _left(y: np.ndarray, wanted: np.ndarray, found: np.ndarray) -> float:
    """What is left of y^2 without what is explained of `wanted`."""
    return np.square(y).sum() - np.square(wanted).sum() + np.square(wanted - found).sum()
