"""Equations on whole numbers: rows of tables by token, rotary tables by position, tokens that wait."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from effc.runtime.kernels.region import program as ops
from effc.runtime.kernels.region.flat import Step
from effc.runtime.kernels.region.program import NOWHERE, Place, Slot
from effc.runtime.kernels.region.record import LAYER
from effc.runtime.kernels.region.steps import TYPES, Args, copied, is_wide, room
from effc.runtime.packed import Packed

if TYPE_CHECKING:
    from effc.runtime.kernels.region.form import Former


def join(former: Former, step: Step) -> bool:
    """Adds the step to the open region; whether it could."""
    take = _LAYERS.get(step.params["name"]) if step.eqn.primitive is LAYER else None
    known = is_wide(step.out()) or take is _counted
    return take is not None and known and take(former, step, Args(former, step))


def _embed(former: Former, step: Step, args: Args) -> bool:
    """Rows of a table of floats, or of packed codes that are grouped along its rows."""
    number, table = args.values
    ids, rows = args.numbers(number), math.prod(step.shape())
    found = _coded(args, table) if isinstance(table, Packed) else _floats(args, table)
    if ids is None or found is None:
        return False
    slots, (vocab, width), numbers = found
    y = room(rows, width)
    former.program.by_rows(ops.EMBED, [y, ids, *slots, vocab, width, *numbers], [ids, *slots], y.slot, rows)
    former.places[step.outs[0]] = y
    return True


Table = tuple[list[Slot], tuple[int, int], list[int]]
"""Its arrays, its shape, and how it is stored, as embed.h has it."""


def _coded(args: Args, table: Packed) -> Table | None:
    scales, zeros = (None if part is None else args.types[part].dtype.name for part in (table.scales, table.zeros))
    slots = [args.slot(part) for part in (table.codes, table.scales, table.zeros)]
    if table.axis != -1 or scales not in TYPES or zeros not in (None, scales):
        return None
    known = [slot for slot in slots if slot is not None]
    stored = [table.bits, table.group or table.extent, TYPES[scales]]
    return (known, (table.columns, table.extent), stored) if len(known) == 3 else None


def _floats(args: Args, table: Any) -> Table | None:
    array = args.matrix(table)
    if array is None:
        return None
    return [args.former.program.input(array), NOWHERE, NOWHERE], array.shape, [0, 1, TYPES[array.dtype.name]]


def _first(former: Former, step: Step, args: Args) -> bool:
    """The first rows of what has a row for each of some tokens."""
    slot, (batch, most, width) = args.slot(args.values[0]), step.shape()
    count = int(args.keywords["count"])
    if slot is None:
        return False
    y = Place(slot, count, width, width)
    if batch > 1:
        y = room(batch * count, width)
        for i in range(batch):
            to, part = (Place(s, count, width, width, 4 * i * n * width) for s, n in ((y.slot, count), (slot, most)))
            former.program.by_rows(ops.MAP, copied(to, part), [slot], y.slot, count)
    former.places[step.outs[0]] = y
    return True


def _counted(former: Former, step: Step, args: Args) -> bool:
    """Whole numbers one after another: here, and outside for what regions do not know."""
    x, start, count = args.numbers(args.values[0]), args.keywords["start"], max(1, args.keywords["count"])
    if x is None:
        return False
    (rows,) = step.shape()
    y = Slot(4 * rows * count, dtype="int32")
    former.program.by_rows(ops.COUNT, [x, y, start, count], [x], y, rows)
    former.counts[step.outs[0]] = y
    former.outside(step)
    return True


def _turns(former: Former, step: Step, args: Args) -> bool:
    """Rotary tables: a row a position."""
    at, freq = (args.numbers(args.values[0]), args.slot(args.values[1]))
    if at is None or freq is None or args.types[args.values[1]].dtype != np.float32:
        return False
    rows, width = math.prod(step.shape()), int(step.out().shape[-1])
    y, sine = room(rows, width), args.keywords["of"] == "sin"
    words = [y, at, freq, width, sine, float(args.keywords["scale"])]
    former.program.by_rows(ops.TURNS, words, [at, freq], y.slot, rows)
    former.places[step.outs[0]] = y
    return True


_LAYERS: dict[str, Callable[[Former, Step, Args], bool]] = {
    "embed": _embed, "turns": _turns, "first": _first, "counted": _counted,
}  # fmt: skip
