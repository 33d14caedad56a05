"""A traced function run with stretches of it as native regions.

Steps are taken in order. What the native runtime knows joins the open region; a step that it does not
know, and that reads what the region makes, closes the region first. All else stays as it was traced.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

from effc.runtime.kernels.region import branch, sides
from effc.runtime.kernels.region import steps as known
from effc.runtime.kernels.region.flat import Flat, Step
from effc.runtime.kernels.region.program import MAP, WORTH, Place, Program, Slot
from effc.runtime.kernels.region.record import LAYER, recording

Call = Callable[[Program], Sequence[jax.Array]]
"""Runs a program: its outputs in order."""


def run(closed: ClosedJaxpr, args: Sequence[Any], call: Call, digits: int) -> list[Any]:
    """The results of `closed` for these arguments."""
    return Former(closed, call, digits).run(args)


class Former:
    """values: arrays outside regions by number; places: values of the open region."""

    def __init__(self, closed: ClosedJaxpr, call: Call, digits: int):
        self.flat, self.call, self.digits = Flat(closed), call, digits
        self.at: float = 0
        self.last: MutableMapping[int, float] = self.flat.last_reads()
        self.values: dict[int, Any] = dict(self.flat.consts)
        self.avals: dict[int, Any] = {}
        self.parts: dict[int, tuple[Any, int, int]] = {}  # columns of an array: a region reads them where they lie
        self._open()

    def _open(self) -> None:
        self.program = Program()
        self.places: dict[int, Place] = {}
        self.views: dict[int, Step] = {}  # of the region's values, made only if something else wants them
        self.members: list[Step] = []
        self.borrowed: dict[int, Place] = {}
        self.caches: dict[int, Slot] = {}
        self.counts: dict[int, Slot] = {}  # whole numbers, made outside too: that costs nothing if none is read
        self.quantized: dict[Any, Slot] = {}
        self.updated: dict[int, Slot] = {}  # by array: caches that the other side of a branch has grown

    def run(self, args: Sequence[Any]) -> list[Any]:
        self.values.update(zip(self.flat.inputs, args, strict=True))
        for at, step in enumerate(self.flat.steps):
            self._take(at, step)
        self._close(len(self.flat.steps))
        return [self._array(atom) for atom in self.flat.results]

    def _take(self, at: int, step: Step) -> None:
        self.at = at
        self.avals.update((number, step.out(i)) for i, number in enumerate(step.outs))
        if sides.joins(self, step):
            self.members.append(step)
            return
        if known.is_view(step) and any(map(self.inside, step.ins)):
            self.defer(step)
            return
        if any(self.inside(atom) for atom in step.ins):
            self._close(at)
        self.outside(step)

    def inside(self, atom: Any) -> bool:
        """Whether the open region makes this value."""
        return isinstance(atom, int) and (atom in self.places or atom in self.views)

    def defer(self, step: Step) -> None:
        """What it is a view of must live as long as the view."""
        (number,) = step.outs
        self.views[number] = step
        self.members.append(step)
        end, todo = self.last.get(number, -1), list(step.ins)
        while todo:
            base = todo.pop()
            if isinstance(base, int):
                self.last[base] = max(self.last.get(base, -1), end)
                todo += self.views[base].ins if base in self.views else ()

    def outside(self, step: Step) -> None:
        args = [self._array(atom) for atom in step.ins]
        for number, value in zip(step.outs, self._evaluate(step, args), strict=True):
            self.values[number] = value
        columns = known.columns_of(step)
        if columns is not None:
            self.parts[step.outs[0]] = step.ins[0], *columns

    def _array(self, atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else self.values[atom]

    def _evaluate(self, step: Step, args: Sequence[Any]) -> Sequence[Any]:
        primitive, params = step.eqn.primitive, step.params
        if primitive is LAYER:
            return [known.reference(step, args)]
        if primitive is branch.BRANCH:
            return branch.reference(*args, **step.params, inner=self._within)
        with recording(False):
            bound = primitive.get_bind_params({k: self._inner(v) for k, v in params.items()})
            # From jax 0.10 on parameters alone, before that functions and parameters.
            functions, params = bound if isinstance(bound, tuple) else ((), bound)
            out = primitive.bind(*functions, *args, **params)
        return out if primitive.multiple_results else [out]

    def _inner(self, value: Any) -> Any:
        """Functions among an equation's parameters (of a loop, a branch) have regions of their own."""
        if isinstance(value, ClosedJaxpr):
            avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in value.in_avals]
            return jax.make_jaxpr(lambda *args: run(value, args, self.call, self.digits))(*avals)
        if isinstance(value, tuple) and any(isinstance(item, ClosedJaxpr) for item in value):
            return tuple(map(self._inner, value))
        return value

    def _within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A side of a branch that is no part of a region, with regions of its own."""

        def run_side(*state: Any) -> Any:
            with recording():
                closed = jax.make_jaxpr(function)(*state)
            return run(closed, state, self.call, self.digits)

        return run_side

    # ---- what steps ask for when they join

    def place(self, atom: Any) -> Place | None:
        """Where a value lies: in the region, or in an array that goes in. None for what is a view."""
        if isinstance(atom, Literal) or atom in self.views:
            return None
        if atom in self.places:
            return self.places[atom]
        if atom in self.parts:
            whole, start, stop = self.parts[atom]
            place = self.place(whole)
            return place and place.columns(start, stop)
        array = self.values[atom]
        rows, width = known.rows_of(array.shape)
        if atom not in self.borrowed:
            self.borrowed[atom] = Place(self.program.input(array), rows, width, width)
        return self.borrowed[atom]

    # ---- the end of a region

    def _close(self, at: int) -> None:
        """Runs the region; values that are read from `at` on become arrays."""
        program, members, places, views = self.program, self.members, self.places, self.views
        self._open()
        if not members:
            return
        if not any(op.code in WORTH for op in program.ops):
            for step in members:  # not worth a call
                self.outside(step)
            return
        wanted = {n: place for n, place in places.items() if self.last.get(n, -1) >= at}
        wanted = {n: self._whole(program, place) for n, place in wanted.items()}
        numbers = {n: program.output(place.slot) for n, place in wanted.items()}
        arrays = self.call(program)
        for n, number in numbers.items():
            self.values[n] = arrays[number].reshape(self.avals[n].shape)
        for step in views.values():
            known_all = all(atom in self.values for atom in step.ins if isinstance(atom, int))
            if known_all and self.last.get(step.outs[0], -1) >= at:
                self.outside(step)

    def _whole(self, program: Program, place: Place) -> Place:
        """The place, or a copy of it where it is only part of its slot or of an array that went in."""
        slot = place.slot
        given = slot.buffer is not None and slot.buffer[0] == "in"
        if slot.shape is not None or (not given and slot.size == 4 * place.rows * place.width):
            return place
        copy = known.room(place.rows, place.width)
        program.by_rows(MAP, known.copied(copy, place), [slot], copy.slot, place.rows)
        return copy
