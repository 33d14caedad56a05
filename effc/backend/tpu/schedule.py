"""What the compiler's dump says of one kernel: cycles of a steady grid step, and the unit that binds.

Two files are read for each kernel: its bundles after register allocation, with branches resolved, and a
row of unit use for each bundle. The last dump of all leaves out the empty bundles that wait, so it is
never counted. A Pallas grid is one loop: the longest back edge; its trip count is the grid's steps and 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

UNITS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VSTORE", "SALU")

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: *(?:> ?)*\{")
_BRANCH = re.compile(r"sbr\.rel \((!)?%p[^)]*\) target bundleno = (\d+)|sbr\.rel target bundleno = (\d+)")
_TEST = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")
_DELAY_SLOTS = 4
_PIPELINE_STAGES = 2
_PIPELINE = 0.4
"""A skip over this much of the loop is the pipeline's own predicate: the step itself."""


@dataclass(frozen=True)
class Kernel:
    """Of one kernel: cycles of a steady step, how many there are, and each unit's least cycles in a step."""

    name: str
    step: int
    steps: int
    units: dict[str, float]
    spills: int

    @property
    def binding(self) -> tuple[str, float]:
        """The unit with the most to do, and its cycles; where they are far below the step, latency binds."""
        return max(self.units.items(), key=lambda pair: pair[1])


@dataclass(frozen=True)
class Unparsed:
    """A kernel whose dump this reader does not understand: no number is better than a wrong one."""

    name: str
    why: str


def read(folder: Path, name: str) -> Kernel | Unparsed:
    """The kernel called `name` in a folder of dumps."""
    bundles = sorted(folder.glob(f"*-{name}*-packed-bundles-post-ra.txt"))
    table = sorted(folder.glob(f"*-{name}*-pre-delay_hlo-static-per-bundle-utilization.txt"))
    if not bundles or not table:
        return Unparsed(name, "the compiler wrote no schedule for it")
    return parse(name, bundles[-1].read_text(), table[-1].read_text())


def parse(name: str, bundles: str, utilization: str) -> Kernel | Unparsed:
    """From the text of both files."""
    code, rows = _bundles(bundles), _rows(utilization)
    if len(code) != len(rows):
        return Unparsed(name, f"{len(code)} bundles but {len(rows)} rows of use")
    loop = _outer_loop(code)
    start, stop = loop or (0, len(code))  # a grid of one step has no loop
    trip = _trip(code[start:stop]) if loop else _PIPELINE_STAGES + 1
    if trip is None:
        return Unparsed(name, "steps depend on data")
    inner = _inner_loops(code, start, stop)
    if inner is None:
        return Unparsed(name, "an inner loop's length depends on data")
    skipped = _skipped(code, start, stop)
    weights = [_weight(at, skipped, inner) for at in range(start, stop)]
    units = _units(rows[start:stop], weights)
    return Kernel(name, sum(weights), trip - _PIPELINE_STAGES, units, _spills(rows[start:stop]))


@dataclass(frozen=True)
class _Row:
    """Use of each unit in one bundle, of capacity, and spilled or filled registers."""

    use: dict[str, float]
    spills: int


def _bundles(text: str) -> list[str]:
    """One string a bundle: lines that continue belong to the bundle above."""
    out: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            out.append(line)
        elif out:
            out[-1] += "\n" + line
    return out


def _rows(text: str) -> list[_Row]:
    lines = text.splitlines()
    names = [part.strip() for part in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    out: list[_Row] = []
    for line in lines[4:]:
        counts = dict(zip(names, map(int, line.split()), strict=False))
        if len(counts) == len(names):
            use = {unit: counts[unit] / capacity[unit] for unit in UNITS if unit in counts}
            out.append(_Row(use, counts.get("VLOAD:FILL", 0) + counts.get("VSTORE:SPILL", 0)))
    return out


def _branches(code: Sequence[str]) -> list[tuple[int, int]]:
    """(from, to) of every branch."""
    out: list[tuple[int, int]] = []
    for at, bundle in enumerate(code):
        for found in _BRANCH.finditer(bundle):
            out.append((at, int(found[2] or found[3])))
    return out


def _outer_loop(code: Sequence[str]) -> tuple[int, int] | None:
    """Bundles [start, stop) of the longest back edge, delay slots included."""
    back = [(to, at + _DELAY_SLOTS + 1) for at, to in _branches(code) if to <= at]
    return max(back, key=lambda span: span[1] - span[0]) if back else None


def _trip(loop: Sequence[str]) -> int | None:
    """How often the loop runs, from the last exit test in it."""
    tests = [int(found[1]) for bundle in loop for found in _TEST.finditer(bundle)]
    return tests[-1] if tests else None


def _inner_loops(code: Sequence[str], start: int, stop: int) -> list[tuple[int, int, int]] | None:
    """(start, stop, trip) of loops inside; None where one has no literal trip."""
    out: list[tuple[int, int, int]] = []
    for at, to in _branches(code):
        if start < to <= at and at + _DELAY_SLOTS + 1 < stop:
            trip = _trip(code[to : at + _DELAY_SLOTS + 1])
            if trip is None:
                return None
            out.append((to, at + _DELAY_SLOTS + 1, trip))
    return out


def _skipped(code: Sequence[str], start: int, stop: int) -> list[tuple[int, int]]:
    """Bundles of bodies that run now and then; the longest skip is the pipeline's own stage if it is most of it."""
    inside = [(at + _DELAY_SLOTS + 1, to) for at, to in _branches(code) if start <= at < to <= stop]
    longest = max(inside, key=lambda span: span[1] - span[0], default=(0, 0))
    own = longest if longest[1] - longest[0] > _PIPELINE * (stop - start) else None
    return [span for span in inside if span != own]


def _weight(at: int, skipped: Sequence[tuple[int, int]], inner: Sequence[tuple[int, int, int]]) -> int:
    """How often a bundle runs in a steady step."""
    if any(a <= at < b for a, b in skipped):
        return 0
    times = 1
    for a, b, trip in inner:
        times *= trip if a <= at < b else 1
    return times


def _units(rows: Sequence[_Row], weights: Sequence[int]) -> dict[str, float]:
    return {unit: sum(w * row.use.get(unit, 0.0) for w, row in zip(weights, rows, strict=True)) for unit in UNITS}


def _spills(rows: Sequence[_Row]) -> int:
    return sum(row.spills for row in rows)
