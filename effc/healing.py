"""The phases `heal` and `calibrate`: passes train the arrays they left behind, then measure what they must know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from effc.errors import EffcError
from effc.ir.core import Module
from effc.passes.base import Notes, Pass, PassError, Phase
from effc.passes.context import Context
from effc.passes.runner import check_module, check_writes
from effc.pipeline import Pipeline
from effc.runtime.train.budget import Budget
from effc.weights import Store

Keep = Callable[[Pass, Store], Store]
"""Puts a pass's new arrays on disk and holds the pass to its exactness."""


def training(passes: Sequence[Pass]) -> list[Pass]:
    """Those that train, in the order they do."""
    return [one for one in passes if one.training_minutes() > 0]


def calibrating(passes: Sequence[Pass]) -> list[Pass]:
    """Those that calibrate, in the order they do."""
    return [one for one in passes if one.calibrates()]


def budgets(passes: Sequence[Pass], asked: Budget | None) -> dict[str, Budget]:
    """What each pass may spend: its own default, or its part of what was asked for all of them together."""
    minutes = {one.name: one.training_minutes() for one in training(passes)}
    if asked is None:
        return {name: Budget(minutes=count) for name, count in minutes.items()}
    total = sum(minutes.values())
    return {name: asked.share(count / total) for name, count in minutes.items()}


def heal(
    module: Module, store: Store, passes: Sequence[Pass], context: Context, allowed: Mapping[str, Budget], keep: Keep
) -> Store:
    """The store after every pass that trains has had its budget; none is spent where it is 0."""
    for made_by in training(passes):
        if allowed[made_by.name]:
            mine = replace(context, name=made_by.name, budget=allowed[made_by.name])
            store = keep(made_by, made_by.train(module, store, mine))
    return store


def calibrate(
    module: Module, store: Store, passes: Sequence[Pass], context: Context
) -> tuple[Module, dict[str, Notes]]:
    """The module with every measured number in it, and what was said of them."""
    said: dict[str, Notes] = {}
    for made_by in calibrating(passes):
        said[made_by.name] = Notes()
        after = made_by.calibrate(module, store, replace(context, name=made_by.name), said[made_by.name])
        check_module(made_by.name, after)
        check_writes(made_by, module, after)
        if after.params != module.params:
            raise PassError(f"{made_by.name}: changed parameters while it calibrated, want attributes alone")
        module = after
    return module, said


def trained(context: Context, made_by: Pass) -> tuple[dict[str, Any], ...]:
    """For the report: every run of the pass."""
    return tuple(fitted.json() for fitted in context.runs.get(made_by.name, []))


def notes(pipeline: Pipeline, asked: Budget | None) -> list[str]:
    """What trains and what calibrates, and when: it is not what the order on the command line says."""
    ordered = pipeline.ordered()
    allowed = {name: budget for name, budget in budgets(ordered, asked).items() if budget}
    later = [one.name for one in ordered if one.phase > Phase.HEAL]
    healed = [f"{name} {budget}" for name, budget in allowed.items() if name not in later]
    coded = [f"{name} {budget}" for name, budget in allowed.items() if name in later]
    out = [f"heal: trained after all changes of structure, before quantization: {', '.join(healed)}"] if healed else []
    out += [f"trained as codes and scales: {', '.join(coded)}"] if coded else []
    measured = [one.name for one in calibrating(ordered)]
    return (
        [*out, f"calibrate: measured last, on the weights as they are served: {', '.join(measured)}"]
        if measured
        else out
    )


def check_asked(pipeline: Pipeline, asked: Budget | None) -> None:
    """EffcError for a budget that no pass can spend."""
    if asked is not None and not training(pipeline.passes):
        raise EffcError(f"--heal {asked}: no pass of '{pipeline}' trains, want one that does (see effc passes)")
