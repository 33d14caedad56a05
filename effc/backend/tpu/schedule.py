"""What the compiler's dump says of one kernel: cycles of a steady grid step, and the unit that binds.

Two files are read for each kernel: its bundles after register allocation, with branches resolved, and a
row of unit use for each bundle. The last dump of all leaves out the empty bundles that wait, so it is
never counted. A Pallas grid is one loop: the longest back edge; its trip count is the grid's steps and 2.
In it one skip is the pipeline's own (is there a block to work on); what is skipped inside of that are bodies
under conditions, which run now and then.
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
    """Of one kernel: cycles of a steady step, how many there are, and each unit's least cycles in a step.

    rare: cycles of bodies that run in some steps only (the first, a sequence's last), all of them once.
    """

    name: str
    step: int
    steps: int
    units: dict[str, float]
    spills: int
    rare: int = 0

    @property
    def binding(self) -> tuple[str, float]:
        """The unit with the most to do, and its cycles; where they are far below the step, latency binds."""
        return max(self.units.items(), key=lambda pair: pair[1])


@dataclass(frozen=True)
class Unparsed:
    """A kernel whose dump this reader does not understand: no number is better than a wrong one."""

    name: str
    why: str


def read(folder: Path, name: str, *, conditional: bool = False) -> Kernel | Unparsed:
    """The kernel called `name` in a folder of dumps; conditional: its step is itself a body under a condition."""
    bundles = _dumps(folder, name, "packed-bundles-post-ra")
    table = _dumps(folder, name, "pre-delay_hlo-static-per-bundle-utilization")
    if not bundles or not table:
        return Unparsed(name, "the compiler wrote no schedule for it")
    return parse(name, bundles[-1].read_text(), table[-1].read_text(), conditional=conditional)


def _dumps(folder: Path, name: str, what: str) -> list[Path]:
    """Files TIME-NAME[.N]-NN-WHAT.txt, in the order of time."""
    wanted = re.compile(rf"\d+-{re.escape(name)}(\.\d+)?-\d+-{what}\.txt")
    return sorted(file for file in folder.glob(f"*-{name}*-{what}.txt") if wanted.fullmatch(file.name))


def parse(name: str, bundles: str, utilization: str, *, conditional: bool = False) -> Kernel | Unparsed:
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
    rare = _rare(code, start, stop, conditional)
    times = [_times(at, inner) for at in range(start, stop)]
    under = [any(a <= at < b for a, b in rare) for at in range(start, stop)]
    weights = [0 if skipped else n for n, skipped in zip(times, under, strict=True)]
    seldom = sum(n for n, skipped in zip(times, under, strict=True) if skipped)
    units = _units(rows[start:stop], weights)
    return Kernel(name, sum(weights), trip - _PIPELINE_STAGES, units, _spills(rows[start:stop]), seldom)


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


def _rare(code: Sequence[str], start: int, stop: int, conditional: bool) -> list[tuple[int, int]]:
    """Bundles of bodies that run now and then: skips inside the pipeline's own, which is most of the loop.

    Skips outside of it are of the pipeline: it issues no copy for a block that is there already; it mostly does.
    """
    skips = [(at + _DELAY_SLOTS + 1, to) for at, to in _branches(code) if start <= at < to <= stop]
    skips.sort(key=lambda span: span[0] - span[1])
    if skips and skips[0][1] - skips[0][0] > _PIPELINE * (stop - start):
        own = skips.pop(0)
        skips = [span for span in skips if own[0] <= span[0] and span[1] <= own[1]]
    return skips[int(conditional) :]


def _times(at: int, inner: Sequence[tuple[int, int, int]]) -> int:
    """How often a bundle runs each time that the code around it does."""
    times = 1
    for a, b, trip in inner:
        times *= trip if a <= at < b else 1
    return times


def _units(rows: Sequence[_Row], weights: Sequence[int]) -> dict[str, float]:
    return {unit: sum(w * row.use.get(unit, 0.0) for w, row in zip(weights, rows, strict=True)) for unit in UNITS}


def _spills(rows: Sequence[_Row]) -> int:
    return sum(row.spills for row in rows)
