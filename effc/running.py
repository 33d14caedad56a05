"""Passes on structure and arrays, each held to its exactness; then what trains, then what calibrates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from effc import evaluate, healing
from effc.clock import Clock
from effc.evaluate import Windows
from effc.passes import runner
from effc.passes.base import Exactness, Pass, PassError, Phase
from effc.passes.context import Context
from effc.passes.runner import Step, Watch
from effc.pipeline import Pipeline
from effc.report import PassReport
from effc.runtime.train.budget import Budget
from effc.state import State, written
from effc.weights import Store

TOLERANCE = 1e-3
"""How far an exact pass may move logits, as a share of their range: f32 rounding through deep models."""

PROBE_TOKENS = 32
"""Of the evaluation text: enough to see whether logits move."""


def run_passes(
    start: State, pipeline: Pipeline, context: Context, asked: Budget | None, spool: Path, watch: Watch, clock: Clock,
    planned: Sequence[Step] = (),
) -> tuple[State, list[PassReport]]:  # fmt: skip
    """Every pass on structure and arrays, each held to its exactness on real tokens; then heal, then calibrate.

    planned: the passes on structure alone; not run again where they hold.
    """
    ordered = pipeline.ordered()
    first = [made_by for made_by in ordered if made_by.phase <= Phase.HEAL]
    context = replace(context, later=ordered[len(first) :])
    with clock.step("passes"):
        run = _Run(start, context, spool, watch, healing.budgets(ordered, asked), planned)
        for made_by in first:
            run.step(made_by)
    if healing.training(first):
        with clock.timed("heal"):
            run.heal()
    with clock.step("passes"):
        for made_by in ordered[len(first) :]:
            run.step(made_by)
    if healing.calibrating(ordered):
        with clock.timed("calibrate"):
            run.calibrate()
    return run.state, list(run.reports.values())


class _Run:
    """The state as passes run, and what is to be said of each."""

    def __init__(
        self, start: State, context: Context, spool: Path, watch: Watch, budgets: Mapping[str, Budget],
        planned: Sequence[Step],
    ):  # fmt: skip
        self.state, self.context, self.spool, self.watch, self.budgets = start, context, spool, watch, budgets
        self.planned = {step.made_by: step for step in planned}
        self.reports: dict[str, PassReport] = {}
        self.ran: list[Pass] = []
        watch("input", start.module)
        self.probe = _Probe(context.heldout)
        self.probe.see("input", start)

    def step(self, made_by: Pass) -> None:
        context = replace(self.context, name=made_by.name, budget=self.budgets.get(made_by.name, Budget()))
        made_by = made_by.decided(self.state.module, self.state.store, context)
        self.ran.append(made_by)
        step = self._structure(made_by)
        self.watch(made_by.name, step.after)
        self.state = _with_arrays(step, self.state, self.spool / made_by.name, context)
        gap = None if step.after == step.before else self.probe.hold(made_by, self.state)
        runs = healing.trained(self.context, made_by)
        self.reports[made_by.name] = replace(_reported(step, gap), trained=runs)

    def _structure(self, made_by: Pass) -> Step:
        """As planned where nothing was decided since; else run on the module as it is."""
        step = self.planned.get(made_by)
        return step if step and step.before == self.state.module else runner.step(made_by, self.state.module)

    def heal(self) -> None:
        before = self.state.store
        if healing.heal(self.state.module, before, self.ran, self.context, self.budgets, self._trained) is not before:
            self.watch("heal", self.state.module)

    def _trained(self, made_by: Pass, store: Store) -> Store:
        self.state = written(State(self.state.module, store), self.spool / f"heal-{made_by.name}")
        gap, runs = self.probe.hold(made_by, self.state), healing.trained(self.context, made_by)
        self.reports[made_by.name] = replace(self.reports[made_by.name], gap=gap, trained=runs)
        return self.state.store

    def calibrate(self) -> None:
        before = self.state
        module, said = healing.calibrate(before.module, before.store, self.ran, self.context)
        for name, notes in said.items():
            report = self.reports[name]
            self.reports[name] = replace(report, choices=[*report.choices, *notes.choices], measured=notes.measured)
        if module != before.module:
            self.state = State(module, before.store)
            self.watch("calibrate", module)


def _with_arrays(step: Step, state: State, spool: Path, context: Context) -> State:
    """The state after; arrays that cost work are made once and kept on disk."""
    store = step.made_by.arrays(step.before, step.after, state.store, context, step.notes)
    after = State(step.after, store)
    if step.after == step.before:
        return state
    return after if step.made_by.exactness < Exactness.LOSSY else written(after, spool)


class _Probe:
    """Logits of a few tokens, seen again after every pass."""

    def __init__(self, text: Windows):
        self.tokens = text.chunks[0][:, :PROBE_TOKENS]

    def see(self, where: str, state: State) -> None:
        """Logits that the next pass is held against; EffcError where they are not finite."""
        self.logits = evaluate.logits(state.side, self.tokens)
        evaluate.check_finite(self.logits, where)

    def hold(self, made_by: Pass, state: State) -> float:
        """How far the pass moved the logits, as a share of their range; PassError where it must not."""
        before = self.logits
        self.see(made_by.name, state)
        gap = evaluate.gap(before, self.logits)
        if gap > TOLERANCE and made_by.exactness <= Exactness.DISTRIBUTION_EXACT:
            raise PassError(
                f"{made_by.name}: is {made_by.exactness}, but moved logits by {gap:.2g} of their range, "
                f"want {TOLERANCE:g} at most: a bug in the pass"
            )
        return gap


def _reported(step: Step, gap: float | None) -> PassReport:
    made_by, notes = step.made_by, step.notes
    return PassReport(str(made_by), str(made_by.exactness), step.seconds, notes.choices, notes.skips, gap)
