"""Both sides of a branch taken into a region: its stages run where the flag, decided on the way, is as they want."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effc.runtime.kernels.region import choices, gathers
from effc.runtime.kernels.region import program as ops
from effc.runtime.kernels.region import steps as known
from effc.runtime.kernels.region.branch import BRANCH, operands
from effc.runtime.kernels.region.flat import Step, reads
from effc.runtime.kernels.region.program import ALWAYS, Branch, Slot

if TYPE_CHECKING:
    from effc.runtime.kernels.region.form import Former


def joins(former: Former, step: Step) -> bool:
    """Whether the step has been taken in; of a branch all of both sides, or else the region is as it was."""
    if step.eqn.primitive is not BRANCH:
        return any(layers.join(former, step) for layers in (known, choices, gathers))
    before = _saved(former)
    if _joined(former, step):
        return True
    former.__dict__.update(before)
    return False


def _saved(former: Former) -> dict[str, Any]:
    """What joining changes."""
    names = ("places", "views", "members", "borrowed", "caches", "counts", "quantized", "last")
    parts = {name: getattr(former, name).copy() for name in names}
    return parts | {"program": former.program.copy(), "at": former.at}


def _joined(former: Former, step: Step) -> bool:
    flags, state, *consts = operands(step.ins, step.params["counts"])
    place = former.place(flags) if former.inside(flags) else None
    if place is None or place.width != 1 or former.program.branch is not ALWAYS:  # a stage has one flag
        return False
    on, off = former.program.decide(place)
    first = _side(former, on, step.params["on"], consts[0], state)
    if first is None:
        return False
    grown = _caches(former, state, first)
    former.updated = {id(former.values[old]): slot for old, slot in grown if old in former.values}
    second = _side(former, off, step.params["off"], consts[1], state)
    former.updated = {}
    if second is None:
        return False
    results = zip(step.outs, state, first, second, strict=True)
    return all(_meet(former, number, old, ((on, a), (off, b))) for number, old, a, b in results)


def _caches(former: Former, state: Sequence[Any], results: Sequence[Any]) -> list[tuple[int, Slot]]:
    """Caches of the state that a side has grown, and where they lie."""
    pairs = zip(state, results, strict=True)
    return [(old, former.caches[new]) for old, new in pairs if isinstance(new, int) and new in former.caches]


def _side(former: Former, branch: Branch, jaxpr: Any, consts: Sequence[Any], state: Sequence[Any]) -> list[Any] | None:
    """The results of a side whose steps have joined; None where one cannot."""
    steps, results = former.flat.side(jaxpr, consts, state)
    outer = {name: getattr(former, name) for name in ("last", "at", "members")}
    quantized, before = former.quantized.copy(), former.program.branch
    places = [former.at + (i + 1) / (len(steps) + 2) for i in range(len(steps) + 1)]
    local = reads(steps, results, places)
    later = {atom: outer["last"][atom] for atom in local if outer["last"].get(atom, -1) > former.at}
    former.last, former.members, former.program.branch = ChainMap({**local, **later}, former.last), [], branch
    taken = all(_taken(former, at, step) for at, step in zip(places, steps, strict=False))
    former.__dict__.update(outer)
    former.quantized, former.program.branch = quantized, before  # what one side makes the other does not have
    return results if taken else None


def _taken(former: Former, at: float, step: Step) -> bool:
    former.at = at
    former.avals.update((number, step.out(i)) for i, number in enumerate(step.outs))
    if joins(former, step):
        return True
    if any(former.inside(atom) for atom in step.ins):
        if not known.is_view(step):
            return False
        former.defer(step)
    else:
        former.outside(step)  # reads nothing that the region makes
    return True


def _meet(former: Former, number: int, old: Any, sides: Sequence[tuple[Branch, Any]]) -> bool:
    """One value from the results of both sides, each copied where its side runs."""
    atoms = [atom for _, atom in sides]
    grown = [atom for atom in atoms if isinstance(atom, int) and atom in former.caches]
    if grown:  # a side that gives back what it was given leaves it where it lies
        former.caches[number] = former.caches[grown[0]]
        former.places[number] = former.places[grown[0]]
        slots = {id(former.caches[atom]) for atom in grown}
        return len(slots) == 1 and all(atom in grown or atom is old or atom == old for atom in atoms)
    aval = former.avals[number]
    if aval.dtype != np.float32:
        return False
    rows, width = known.rows_of(aval.shape)
    meeting, outer = known.room(rows, width), former.program.branch
    for branch, atom in sides:
        found = former.place(atom)
        place = found and found.reshaped(rows, width)
        if place is None:
            return False
        former.program.branch = branch
        former.program.by_rows(ops.MAP, known.copied(meeting, place), [place.slot], meeting.slot, rows)
        former.program.branch = outer
    former.places[number] = meeting
    return True
