"""From schedules and bytes to an estimated time of a step, and what binds each kernel.

A kernel's time: its first tile's fill, which nothing hides, a step after another, each the longer of its
schedule and its bytes, and the last step's schedule. XLA's own ops: the bytes they touch, and LAUNCH for
each. Left out: waits on DMA latency, instruction fetch, anything between chips. So it is a floor to
compare programs by, not a promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from effc.runtime.kernels.generations import Generation

LAUNCH = 0.5e-6
"""Seconds assumed to begin one op of XLA's: no public figure; the share it makes is shown."""


@dataclass(frozen=True)
class KernelTime:
    """calls a step of the program; cycles and HBM cycles of a grid step, None where its schedule was not understood."""

    name: str
    calls: int
    steps: int
    cycles: int | None
    hbm_cycles: float
    binding: str
    spills: int
    seconds: float  # all calls
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """Of the schedule to HBM: below 1 the kernel is at the memory's speed."""
        return None if self.cycles is None else self.cycles / self.hbm_cycles


@dataclass(frozen=True)
class Estimate:
    """Of one call of a program: seconds in kernels and around them."""

    name: str
    tokens: int
    kernels: list[KernelTime]
    ops: dict[str, int]
    around_seconds: float
    weight_bytes: float
    argument_bytes: int
    temporary_bytes: int
    fits: bool
    copies: list[str]
    hbm_bytes_a_second: float

    @property
    def seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels) + self.around_seconds

    @property
    def roofline(self) -> float:
        """Share of the speed at which coded weights could be streamed."""
        return self.weight_bytes / self.hbm_bytes_a_second / self.seconds if self.seconds else 0.0

    def json(self) -> dict[str, Any]:
        kernels = [asdict(kernel) | {"ratio": kernel.ratio} for kernel in self.kernels]
        own = asdict(self) | {"kernels": kernels}
        return own | {"seconds": self.seconds, "tokens_a_second": self.tokens / self.seconds, "roofline": self.roofline}


def estimate(name: str, found: Mapping[str, Any], chip: Generation) -> Estimate:
    """From what `child` printed of one program."""
    kernels = [_kernel(kernel, chip) for kernel in found["kernels"]]
    streamed = sum(k["calls"] * k["steps"] * k["step_bytes"] for k in found["kernels"])
    rest = max(found["bytes_accessed"] - streamed, 0.0)
    others = sum(found["ops"].values())
    resident = found["argument_bytes"] + found["temporary_bytes"] + found["program_bytes"]
    return Estimate(
        name, found["tokens"], kernels, found["ops"],
        rest / chip.hbm_bytes_a_second + others * LAUNCH, streamed,
        found["argument_bytes"], found["temporary_bytes"], resident <= chip.hbm_bytes, found["copies"],
        chip.hbm_bytes_a_second,
    )  # fmt: skip


def _kernel(found: Mapping[str, Any], chip: Generation) -> KernelTime:
    hbm = found["step_bytes"] / chip.bytes_a_cycle
    cycles, units = found.get("cycles"), found.get("units", {})
    busy = (found["steps"] - 1) * max(hbm, cycles or 0) + (hbm if cycles is None else cycles)
    seconds = found["calls"] * (hbm + busy) / chip.hz
    return KernelTime(
        found["name"], found["calls"], found["steps"], cycles, hbm, _binding(cycles, hbm, units),
        found.get("spills", 0), seconds, found.get("unparsed", ""),
    )  # fmt: skip


def _binding(cycles: int | None, hbm: float, units: Mapping[str, float]) -> str:
    """HBM, a unit, or latency where no unit is busy for most of the step."""
    if cycles is None:
        return "?"
    if cycles <= hbm:
        return "HBM"
    unit, most = max(units.items(), key=lambda pair: pair[1])
    return unit if most > cycles / 2 else "latency"
