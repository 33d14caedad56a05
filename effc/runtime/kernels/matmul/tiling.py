"""Columns of a step of the TPU matmul, chosen by a model of its schedule, for a TPU generation and a shape.

A step costs its fixed overhead and what the busiest unit has to do; the first tile's way from HBM is exposed.
So the fastest of those tiles is taken whose schedule leaves `slack` of HBM's time; where there is none, the
fastest. The constants were fitted to schedules (`python -m effc.backend.tpu.cases v5e:2x2` prints those).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from effc.runtime.kernels.generations import GENERATIONS, Generation
from effc.runtime.kernels.matmul.steps import Form

VMEM = {"v4": 16 * 2**20, "v5e": 96 * 2**20, "v5p": 60 * 2**20, "v6e": 96 * 2**20, "tpu7x": 60 * 2**20}
"""Bytes a kernel may use."""

_FILLED = 0.6
"""Of them, what blocks and scratch take; the compiler spills to the rest."""

_PUSHES = 1024
"""Products of DEPTH by DEPTH codes in a step: more is long to compile, and to fetch as instructions."""

_LANES = 128
_PUSHED, _CONVERTED = 4096, 11_000
"""int8 codes a cycle that go into the matrix units, and int4 ones that are made int8."""


_NEARLY = 1.05
"""Of slack, that is left for tiles without a rest."""

_LOOSER = (1, 1.4, 1.5)
"""Times slack, one after another where no tile is within it: short groups have more partial sums to scale."""

_MANY = 64
"""Rows of digits from which partial sums spill."""

_BEGUN = 235
"""Cycles of quantizing, however few rows there are."""

_MIXED = 0.3
"""What quantizing still adds where there is one step."""


@dataclass(frozen=True)
class Tile:
    """HBM bytes and cycles of a step, and what quantizing adds to the first."""

    hbm_bytes: float
    cycles: float
    once: float

    def share(self, chip: Generation, count: int) -> float:
        """Of HBM's time that schedules take, over `count` steps; in a step alone, quantizing mixes with products."""
        once = self.once / count if count > 1 else _MIXED * self.once
        return (self.cycles + once) * chip.bytes_a_cycle / self.hbm_bytes


def columns(form: Form, width: int, bits: int, sizes: Sequence[int], chip: str) -> int:
    """Columns of a step; sizes: bytes of one scale and, where there are any, of one zero point."""
    generation = GENERATIONS[chip]
    step = max(generation.unit, _LANES)
    fits = [n for n in range(step, width, step) if _allowed(replace(form, columns=n), bits, sizes, chip)]
    whole = [width] * (not fits or _allowed(replace(form, columns=width), bits, sizes, chip))
    made = {n: replace(form, columns=n) for n in fits + whole}
    share = {n: modelled(one, bits, sizes, generation).share(generation, -(-width // n)) for n, one in made.items()}
    even = [n for n in made if width % n == 0]  # a last tile that is not full takes copies of its own
    good = list(made)
    for least in (generation.slack * looser for looser in _LOOSER):
        if left := [n for n in even if share[n] <= _NEARLY * least] or [n for n in made if share[n] <= least]:
            good = left
            break
    return min(good, key=lambda n: seconds(made[n], width, bits, sizes, generation))


def strip(form: Form, unit: int) -> int:
    """Columns whose sums are held at once: the matrix unit's, or fewer where sums of those would not fit registers."""
    return _LANES if form.blocks > 1 and form.digit_rows >= _MANY else unit


def _allowed(form: Form, bits: int, sizes: Sequence[int], chip: str) -> bool:
    pushes = len(form.spans()) * form.columns / _LANES * max(1, min(form.group, form.extent) / 128)
    return pushes <= _PUSHES and vmem(form, bits, sizes) <= _FILLED * VMEM[chip]


def seconds(form: Form, width: int, bits: int, sizes: Sequence[int], chip: Generation) -> float:
    """Of a call: the first tile, a step after another at the slower of memory and schedule, the last schedule."""
    tile = modelled(form, bits, sizes, chip)
    hbm, count = tile.hbm_bytes / chip.bytes_a_cycle, -(-width // form.columns)
    scheduled = (tile.cycles + tile.once / count) / chip.slack
    return (hbm + (count - 1) * max(hbm, scheduled) + scheduled) / chip.hz


def modelled(form: Form, bits: int, sizes: Sequence[int], chip: Generation) -> Tile:
    """What the schedule of a step is expected to be."""
    weights = form.extent * form.columns
    pushed = weights / _PUSHED * (2 if form.layout == "nk" else 1) * (chip.unit // form.strip if form.blocks > 1 else 1)
    multiplied = max(form.digit_rows, 32) * weights / chip.int8_macs
    registers = -(-form.sums // 8) * len(form.spans()) * form.columns / _LANES
    each = (5 if form.digits == 2 and not form.few else 3) + 2 * (len(sizes) > 1)
    decoded = sum(10 for size in sizes if size < 4) * form.groups * form.columns / 1024
    computed = (registers * each + decoded) / 4 + (weights / _CONVERTED if bits == 4 else 0)
    quantized = form.extent * (form.rows + form.digit_rows) / 1024 * 1.3
    once = max(60 + quantized, _BEGUN * (2 if form.few and form.blocks > 1 else 1))
    return Tile(form.tile_bytes(bits, sizes), max(pushed, multiplied, computed) + chip.overhead, once)


def vmem(form: Form, bits: int, sizes: Sequence[int]) -> int:
    """Bytes of blocks, two of each, and of scratch."""
    decoded = sum(4 * form.groups * form.columns for size in sizes if size < 4)
    x = form.rows * form.extent * 4 if form.inside else form.digit_rows * form.extent
    sums = 4 * len(form.spans()) * form.sums * _LANES * (len(sizes) > 1)
    scratch = decoded + sums + form.inside * form.digit_rows * form.extent
    return int(2 * (form.tile_bytes(bits, sizes) + x + 4 * form.rows * form.columns) + scratch)
