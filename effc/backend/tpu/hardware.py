"""Which TPU generation a target is of."""

from __future__ import annotations

from effc.errors import EffcError, nearest
from effc.runtime.kernels.generations import GENERATIONS, Generation

CUBES = frozenset({"v4", "v5p", "tpu7x"})
"""Generations whose chips lie in three dimensions."""


def generation(target: str) -> Generation:
    """EffcError for a target of no known generation."""
    name, _, shape = target.partition(":")
    if name not in GENERATIONS or not shape:
        known = ", ".join(f"{g}:2x2{'x1' * (g in CUBES)}" for g in GENERATIONS)
        hint = nearest(name, GENERATIONS) if name not in GENERATIONS else ""
        raise EffcError(f"--target {target}: no such TPU, want one like {known}{hint}")
    return GENERATIONS[name]
