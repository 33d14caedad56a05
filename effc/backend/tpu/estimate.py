"""From schedules and bytes to an estimated time of a step, and what binds each kernel; docs/tpu.md has the reasons.

A kernel's time: its first tile's fill, which nothing hides, a step after another, each the longer of its
schedule and its bytes, and the last step's schedule; bodies that only some steps run, as far as they do not fit
under the bytes of their step; and LAUNCH for each call. XLA's own ops: the cycles that its compiler reckons them to
take, some 1800 for the smallest; numbers of one element are the scalar unit's, in between. Left out: waits on DMA
latency, instruction fetch, anything between chips. So it is a floor to compare programs by, not a promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from effc.runtime.kernels.generations import Generation

LAUNCH = 0.5e-6
"""Seconds assumed to begin one kernel, beside its first fill: no public figure."""

WEIGHTS = ("matmul", "vocabulary")
"""Kernels that read weights, by how their names begin."""


@dataclass(frozen=True)
class KernelTime:
    """calls a step of the program; cycles and HBM cycles of a grid step, None where its schedule was not understood.

    rare: cycles, spread over all steps, of what only some do. Seconds are of all calls.
    """

    name: str
    calls: int
    steps: int
    hbm_bytes: float  # a call
    vmem_bytes: int
    cycles: int | None
    rare: float
    hbm_cycles: float
    binding: str
    spills: int
    compute_seconds: float
    memory_seconds: float
    seconds: float
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """Of the schedule to HBM: below 1 the kernel is at the memory's speed."""
        return None if self.cycles is None else (self.cycles + self.rare) / self.hbm_cycles


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
        return self._share(self.weight_bytes)

    @property
    def streamed(self) -> float:
        """The same of all that kernels read, caches too."""
        return self._share(sum(kernel.calls * kernel.hbm_bytes for kernel in self.kernels))

    def _share(self, read: float) -> float:
        return read / self.hbm_bytes_a_second / self.seconds if self.seconds else 0.0

    def json(self) -> dict[str, Any]:
        kernels = [asdict(kernel) | {"ratio": kernel.ratio} for kernel in self.kernels]
        own = asdict(self) | {"kernels": kernels}
        rates = {"tokens_a_second": self.tokens / self.seconds, "roofline": self.roofline, "streamed": self.streamed}
        return own | {"seconds": self.seconds, **rates}


def estimate(name: str, found: Mapping[str, Any], chip: Generation) -> Estimate:
    """From what `child` printed of one program."""
    kernels = [_kernel(kernel, chip) for kernel in found["kernels"]]
    weights = sum(k.calls * k.hbm_bytes for k in kernels if k.name.startswith(WEIGHTS))
    resident = found["argument_bytes"] + found["temporary_bytes"] + found["program_bytes"]
    return Estimate(
        name, found["tokens"], kernels, found["ops"],
        found["around_cycles"] / chip.hz + LAUNCH * sum(kernel.calls for kernel in kernels), weights,
        found["argument_bytes"], found["temporary_bytes"], resident <= chip.hbm_bytes, found["copies"],
        chip.hbm_bytes_a_second,
    )  # fmt: skip


def _kernel(found: Mapping[str, Any], chip: Generation) -> KernelTime:
    calls, steps, hbm = found["calls"], found["steps"], found["step_bytes"] / chip.bytes_a_cycle
    cycles, units, rare, times = found.get("cycles"), found.get("units", {}), found.get("rare", 0), found["times"]
    known = cycles or 0
    longest = max(hbm, known)
    last = hbm if cycles is None else known
    total = hbm + (steps - 1) * longest + last + times * max(0.0, known + rare - longest)
    return KernelTime(
        found["name"], calls, steps, found["step_bytes"] * steps, found["vmem"], cycles, rare * times / steps, hbm,
        _binding(cycles, hbm, units), found.get("spills", 0), calls * (known * steps + rare * times) / chip.hz,
        calls * hbm * steps / chip.hz, calls * total / chip.hz, found.get("unparsed", ""),
    )  # fmt: skip


def _binding(cycles: int | None, hbm: float, units: Mapping[str, float]) -> str:
    """HBM, a unit, or latency where no unit is busy for most of the step."""
    if cycles is None:
        return "?"
    if cycles <= hbm:
        return "HBM"
    unit, most = max(units.items(), key=lambda pair: pair[1])
    return unit if most > cycles / 2 else "latency"
