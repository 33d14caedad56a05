"""Figures of each TPU generation that tiles and estimates need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """Of one core: hz of its clock, bytes a second from HBM, bytes of HBM and VMEM, width of its matrix units.

    int8_macs: multiply-adds a cycle; overhead: cycles of a step that no unit is busy for; slack: the share of HBM's
    time that a step's schedule should take, since waits on DMA are not in it.
    """

    name: str
    hz: float
    hbm_bytes_a_second: float
    hbm_bytes: int
    vmem_bytes: int
    unit: int
    int8_macs: int
    overhead: int
    slack: float

    @property
    def bytes_a_cycle(self) -> float:
        """From HBM."""
        return self.hbm_bytes_a_second / self.hz


_GIB, _MIB = 2**30, 2**20

GENERATIONS = {
    g.name: g
    for g in (
        # Clocks of v5e and v6e: public peaks over the multiply-adds a cycle in schedules; the others: public figures.
        Generation("v4", 1.05e9, 1228e9, 32 * _GIB, 16 * _MIB, 128, 65536, 215, 0.65),
        Generation("v5e", 1.50e9, 819e9, 16 * _GIB, 128 * _MIB, 128, 131072, 215, 0.4),
        Generation("v5p", 1.75e9, 2765e9, 95 * _GIB, 64 * _MIB, 128, 131072, 215, 0.65),
        Generation("v6e", 1.75e9, 1640e9, 32 * _GIB, 128 * _MIB, 256, 262144, 305, 0.65),
        Generation("tpu7x", 1.90e9, 3690e9, 96 * _GIB, 64 * _MIB, 256, 262144, 305, 0.65),
    )
}
"""tpu7x: of one of its two cores."""

NO_INT8 = frozenset({"v4"})
"""Generations whose matrix unit takes no int8: codes are XLA's there, since to make floats of them in a kernel takes
forty times what reading them does."""
