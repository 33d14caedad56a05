"""A traced function as a flat list of equations: calls of other traced functions are written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
"""Primitives that are their function, and the parameter it is in."""


@dataclass(frozen=True)
class Step:
    """An equation whose operands are literals or numbers of values; -1 among outs is no value."""

    eqn: JaxprEqn
    ins: tuple[Any, ...]
    outs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of its primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Of its primitive."""
        return self.eqn.params

    def shape(self, i: int = 0) -> tuple[int, ...]:
        """Of operand i."""
        return tuple(self.eqn.invars[i].aval.shape)  # pyright: ignore[reportAttributeAccessIssue]

    def out(self, i: int = 0) -> Any:
        """Shape and dtype of result i."""
        return self.eqn.outvars[i].aval


class Flat:
    """steps in order; inputs and consts by number; results are literals or numbers."""

    def __init__(self, closed: ClosedJaxpr):
        self._numbers = count()
        self.steps: list[Step] = []
        jaxpr = closed.jaxpr
        names = {var: next(self._numbers) for var in (*jaxpr.constvars, *jaxpr.invars)}
        self.consts = [(names[var], value) for var, value in zip(jaxpr.constvars, closed.consts, strict=True)]
        self.inputs = [names[var] for var in jaxpr.invars]
        self._write(jaxpr, names)
        self.results = [_atom(var, names) for var in jaxpr.outvars]
        self.steps = _read(self.steps, self.results)

    def side(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> tuple[list[Step], list[Any]]:
        """Steps of a function that is called with these atoms, and its results; the steps are not among `steps`."""
        before, self.steps = self.steps, []
        names: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        names.update(zip(jaxpr.invars, args, strict=True))
        self._write(jaxpr, names)
        results = [_atom(var, names) for var in jaxpr.outvars]
        steps, self.steps = _read(self.steps, results), before
        return steps, results

    def _write(self, jaxpr: Jaxpr, names: dict[Any, Any]) -> None:
        for eqn in jaxpr.eqns:
            ins = tuple(_atom(var, names) for var in eqn.invars)
            inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
            if isinstance(inner, ClosedJaxpr):
                results = self._call(inner, ins)
                names.update(zip(eqn.outvars, results, strict=True))
                continue
            outs = tuple(next(self._numbers) for _ in eqn.outvars)
            names.update(zip(eqn.outvars, outs, strict=True))
            self.steps.append(Step(eqn, ins, outs))

    def _call(self, closed: ClosedJaxpr, ins: Sequence[Any]) -> list[Any]:
        jaxpr = closed.jaxpr
        names: dict[Any, Any] = dict(zip(jaxpr.invars, ins, strict=True))
        for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
            names[var] = next(self._numbers)
            self.consts.append((names[var], value))
        self._write(jaxpr, names)
        return [_atom(var, names) for var in jaxpr.outvars]

    def last_reads(self) -> dict[int, float]:
        """The place of the last step that reads each value; past the end for results."""
        return reads(self.steps, self.results, range(len(self.steps) + 1))


def reads(steps: Sequence[Step], results: Sequence[Any], places: Sequence[float]) -> dict[int, float]:
    """The last of the places at which each value is read: one a step, and one for the results."""
    last: dict[int, float] = {}
    for place, step in zip(places, steps, strict=False):
        last.update((atom, place) for atom in step.ins if isinstance(atom, int))
    last.update((atom, places[-1]) for atom in results if isinstance(atom, int))
    return last


def _read(steps: Sequence[Step], results: Sequence[Any]) -> list[Step]:
    """The steps that results depend on, or that do something else."""
    read = {atom for atom in results if isinstance(atom, int)}
    kept: list[Step] = []
    for step in reversed(steps):
        if step.eqn.effects or not read.isdisjoint(step.outs):
            kept.append(step)
            read.update(atom for atom in step.ins if isinstance(atom, int))
    return kept[::-1]


def _atom(var: Any, names: dict[Any, Any]) -> Any:
    return var if isinstance(var, Literal) else names[var]
