"""The few constants of each TPU generation that estimates need."""

from __future__ import annotations

from dataclasses import dataclass

from effc.errors import EffcError, nearest


@dataclass(frozen=True)
class Generation:
    """hz of the core's clock, bytes a second from HBM, bytes of HBM and VMEM of one core's chip; `accelerator`
    is what the compiler is told by environment."""

    name: str
    hz: float
    hbm_bytes_a_second: float
    hbm_bytes: int
    vmem_bytes: int

    @property
    def bytes_a_cycle(self) -> float:
        """From HBM."""
        return self.hbm_bytes_a_second / self.hz


_GIB, _MIB = 2**30, 2**20

GENERATIONS = {
    g.name: g
    for g in (
        # Clocks of v5e and v6e: public peaks over the multiply-adds a cycle in schedules; the others: public figures.
        Generation("v4", 1.05e9, 1228e9, 32 * _GIB, 16 * _MIB),
        Generation("v5e", 1.50e9, 819e9, 16 * _GIB, 128 * _MIB),
        Generation("v5p", 1.75e9, 2765e9, 95 * _GIB, 64 * _MIB),
        Generation("v6e", 1.75e9, 1640e9, 32 * _GIB, 128 * _MIB),
        Generation("tpu7x", 1.90e9, 3690e9, 96 * _GIB, 64 * _MIB),
    )
}
"""By the name that a target begins with: `v5e` of `v5e:2x2`. tpu7x: of one of its two cores."""


def generation(target: str) -> Generation:
    """EffcError for a target of no known generation."""
    name, _, shape = target.partition(":")
    if name not in GENERATIONS or not shape:
        known = ", ".join(f"{g}:2x2" for g in GENERATIONS)
        raise EffcError(f"--target {target}: no such TPU, want one like {known}{nearest(name, GENERATIONS)}")
    return GENERATIONS[name]
