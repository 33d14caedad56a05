"""Equations by which tokens choose: how sure logits are, whether that is enough, which of two rows is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from effc.runtime.kernels.region import program as ops
from effc.runtime.kernels.region.flat import Step
from effc.runtime.kernels.region.program import NOWHERE, Place
from effc.runtime.kernels.region.record import LAYER
from effc.runtime.kernels.region.steps import COLUMNS, FUNCTIONS, Args, is_wide, room, rows_of

if TYPE_CHECKING:
    from effc.runtime.kernels.region.form import Former

REACHED, DIFFERS = len(FUNCTIONS), len(FUNCTIONS) + 1
"""Of rowops.h's functions those that are no primitives."""


def join(former: Former, step: Step) -> bool:
    """Adds the step to the open region; whether it could."""
    take = _LAYERS.get(step.params["name"]) if step.eqn.primitive is LAYER else None
    return take is not None and is_wide(step.out()) and take(former, step, Args(former, step))


def _sure(former: Former, step: Step, args: Args, *, margin: bool) -> bool:
    """How likely the likeliest is, or how much more than the next."""
    shape, found = step.shape(), args.place(args.values[0])
    x = found and found.reshaped(math.prod(shape[:-1]), shape[-1])
    if x is None:
        return False
    y = room(x.rows, 1)
    former.program.by_rows(ops.SURE, [x, y, x.width, margin], [x.slot], y.slot, x.rows)
    former.places[step.outs[0]] = y
    return True


def _select(former: Former, step: Step, args: Args) -> bool:
    """Rows of one value or of another."""
    rows, width = rows_of(step.out().shape)
    places = _in_rows(step, args, (1, width, width))
    if len(places) < 3:
        return False
    y, (where, a, b) = room(rows, width), places
    former.program.by_rows(ops.SELECT, [y, where, a, b, width], [where.slot, a.slot, b.slot], y.slot, rows)
    former.places[step.outs[0]] = y
    return True


def _reached(former: Former, step: Step, args: Args) -> bool:
    """A number 0 or 1 a row."""
    rows, width = rows_of(step.out().shape)
    places = _in_rows(step, args, (width, width)) if step.shape() == step.shape(1) else []
    if len(places) < 2:
        return False
    y, (x, limit) = room(rows, width), places
    former.program.by_rows(ops.MAP, [y, x, limit, REACHED, width, 1, 1, 0.0], [x.slot, limit.slot], y.slot, rows)
    former.places[step.outs[0]] = y
    return True


def _in_rows(step: Step, args: Args, widths: Sequence[int]) -> list[Place]:
    """The arguments in the rows of the result; fewer where one does not lie so."""
    rows = rows_of(step.out().shape)[0]
    found = [args.place(number) for number in args.values]
    lie = [place and place.reshaped(rows, width) for place, width in zip(found, widths, strict=True)]
    return [place for place in lie if place is not None]


def _score(former: Former, step: Step, args: Args) -> bool:
    """A product with a dense matrix of few columns, in a region that is open for others."""
    given: list[Any] = [*args.values, None]
    number, table, bias = given[:3]
    if not isinstance(table, int) or not former.inside(args.atoms[number]):
        return False
    x, w, b = args.place(number), args.place(table), args.place(bias)
    shape, columns = step.shape(), int(step.out().shape[-1])
    x = x and x.reshaped(math.prod(shape[:-1]), shape[-1])
    if x is None or b is None or w is None or w.offset or w.stride != columns or columns > COLUMNS:
        return False
    if args.keywords.get("layout", "kn") != "kn":
        return False
    y = room(x.rows, columns)
    words = [x, y, w.slot, b.slot, x.width, columns]
    former.program.by_rows(ops.DENSE, words, [x.slot, w.slot, b.slot], y.slot, x.rows)
    former.places[step.outs[0]] = y
    return True


def _differs(former: Former, step: Step, args: Args) -> bool:
    """A number 0 or 1 each."""
    rows, width = rows_of(step.out().shape)
    places = _in_rows(step, args, (width,))
    if not places:
        return False
    y, (x,), nowhere = room(rows, width), places, Place(NOWHERE, 1, 1, 0)
    words = [y, x, nowhere, DIFFERS, width, 1, 0, float(args.keywords["number"])]
    former.program.by_rows(ops.MAP, words, [x.slot], y.slot, rows)
    former.places[step.outs[0]] = y
    return True


_LAYERS: dict[str, Callable[[Former, Step, Args], bool]] = {
    "margin": partial(_sure, margin=True), "likeliest": partial(_sure, margin=False),
    "select": _select, "reached": _reached, "linear": _score, "differs": _differs,
}  # fmt: skip
