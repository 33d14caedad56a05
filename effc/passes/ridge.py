"""Ridge regression from sums: a matrix in closed form, of as many rows as there are."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

RIDGE = 1e-3
"""Of the mean square of the inputs, added to each."""

BLOCK = 2048
"""Rows summed at a time."""


@dataclass(frozen=True)
class Sums:
    """Normal equations of rows x[n,k] and of what they should give, y[n,d].

    inputs x'x f64[k,k]; wanted x'y f64[k,d]; total, the sum of x, f64[k]; size, the sum of y^2; rows, n.
    """

    inputs: np.ndarray
    wanted: np.ndarray
    total: np.ndarray
    size: float
    rows: int

    @staticmethod
    def of(x: np.ndarray | jax.Array, y: np.ndarray | jax.Array) -> Sums:
        """x[...,k], y[...,d]."""
        x, y = (np.asarray(v, np.float32).reshape(-1, v.shape[-1]) for v in (x, y))
        whole = [(x.shape[1], x.shape[1]), (x.shape[1], y.shape[1]), (x.shape[1],), ()]
        inputs, wanted, total, size = (np.zeros(shape) for shape in whole)
        for at in range(0, len(x), BLOCK):
            part = [np.asarray(one) for one in _summed(*(_padded(v[at : at + BLOCK]) for v in (x, y)))]
            inputs, wanted, total, size = (a + b for a, b in zip((inputs, wanted, total, size), part, strict=True))
        return Sums(inputs, wanted, total, float(size), len(x))

    def __add__(self, other: Sums) -> Sums:
        inputs, wanted = self.inputs + other.inputs, self.wanted + other.wanted
        return Sums(inputs, wanted, self.total + other.total, self.size + other.size, self.rows + other.rows)

    def solved(self, bias: np.ndarray | None = None) -> tuple[np.ndarray, float]:
        """f32[k,d], the matrix from x to y less the bias f32[d]; and the share of y^2 that it does not explain."""
        wanted = self.wanted if bias is None else self.wanted - np.outer(self.total, bias)
        inner = self.inputs + RIDGE * np.trace(self.inputs) / len(self.inputs) * np.eye(len(self.inputs))
        found = np.linalg.solve(inner, wanted)
        told = 2 * np.sum(found * wanted) - np.sum(found * (self.inputs @ found))
        return found.astype(np.float32), float(1 - told / max(self.size, 1e-30))


def _padded(rows: np.ndarray) -> np.ndarray:
    """With rows of zeros up to a block, which add nothing: one shape is compiled."""
    return np.pad(rows, ((0, BLOCK - len(rows)), (0, 0)))


@jax.jit
def _summed(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    return x.T @ x, x.T @ y, x.sum(0), jnp.sum(y * y)
