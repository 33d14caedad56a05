"""What a shared matrix lacks of a layer's own, as a product of two narrow ones."""

from __future__ import annotations

import numpy as np

from effc.weights import Array


def low_rank(residual: Array, rank: int) -> tuple[Array, Array]:
    """B [m,rank] and A [rank,n] whose product is nearest to residual [m,n] in squares (Relaxed Recursive
    Transformers, Eq. 4: U*S and V^T of the singular value decomposition); exact from rank min(m,n) on."""
    u, s, v = np.linalg.svd(residual.astype(np.float64), full_matrices=False)
    b, a = u[:, :rank] * s[:rank], v[:rank]
    missing = rank - b.shape[1]
    if missing > 0:
        b, a = np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))
    return b.astype(np.float32), a.astype(np.float32)
