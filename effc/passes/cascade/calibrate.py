"""The alpha of a deferral rule by Learn-then-Test, and what it is worth beside plain speculation and plain decoding."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effc import certificate
from effc.calibration.learn_then_test import Certificate, certify
from effc.curves import summary
from effc.ir.core import Module
from effc.ir.decoding import CASCADE, CERTIFIED
from effc.passes.base import Notes
from effc.passes.cascade.small import GAMMA, Cascading, with_decode
from effc.passes.cascade.texts import Prompts, Speaking, certified_line, promise
from effc.passes.cascade.ways import Curve, drawn, running
from effc.passes.draft import plan
from effc.runtime.deferral import GRIDS
from effc.runtime.engine import Engine

if TYPE_CHECKING:
    from effc.passes.context import Context
    from effc.weights import Store

SHORT = 2
"""Drafts at most where texts alone count, which do not depend on it: many rows at once, and those refused cost."""

PLAIN, SPECULATION, CASCADED = "plain decoding", "plain speculation", "the cascade"


def by_rule(made_by: Cascading, module: Module, store: Store, context: Context, notes: Notes) -> Module:
    """The module with a certified alpha and what was measured; plain speculation where that is as fast."""
    started, engine = time.perf_counter(), plan.served(module, store)
    if not made_by.automatic:
        return by_hand(made_by, planned(made_by, module, engine, context, notes), engine, context, notes)
    engine.eos = tuple(context.tokenizer.eos_ids) if context.tokenizer else ()
    rule, prompts = rule_of(module), Prompts.of(made_by, context)
    speaking = Speaking(plan.decoding(engine, with_decode(module, _strategy(module), gamma=SHORT)), prompts)
    grid = GRIDS[rule]
    found = certify(speaking.losses, len(prompts.rows), delta=made_by.delta, epsilon=made_by.epsilon, grid=grid)
    if found.chosen is None:
        notes.chose(f"plain speculation, the large model's own text: {found.reason('alpha')}")
        settled = planned(made_by, without(module), engine, context, notes)
        curve = drawn(made_by, settled, engine, prompts, None)
        notes.measured = _numbers(rule, found, speaking, {}, curve, notes, started)
        return settled
    told = with_decode(module, _strategy(module), alpha=found.chosen)
    notes.chose(certified_line(found, f"alpha of {rule},"))
    settled, speeds = _faster(made_by, told, promise(made_by, found, found.chosen), engine, prompts, context, notes)
    curve = drawn(made_by, settled, engine, prompts, (running(module)[0], found.chosen))
    notes.measured = _numbers(rule, found, speaking, speeds, curve, notes, started)
    return certificate.bind(settled, store) if has_rule(settled) else settled


def by_hand(made_by: Cascading, module: Module, engine: Engine, context: Context, notes: Notes) -> Module:
    """The module as it is, and what its setting is worth on a few prompts."""
    engine.eos = tuple(context.tokenizer.eos_ids) if context.tokenizer else ()
    curve = drawn(made_by, module, engine, Prompts.of(made_by, context), running(module))
    notes.measured = {"kind": "cascade", "tried": [], "curve": curve, "summary": [*notes.choices, *summary(curve)]}
    return module


def rule_of(module: Module) -> str:
    """The deferral rule of its `decode`."""
    assert module.decode is not None
    return str(module.decode.attrs["rule"])


def has_rule(module: Module) -> bool:
    """Whether it is a cascade still."""
    return module.decode is not None and "rule" in module.decode.attrs


def without(module: Module) -> Module:
    """The same drafter for plain speculation."""
    assert module.decode is not None
    gamma = min(GAMMA, int(str(module.decode.attrs["gamma"])))
    return with_decode(module, "speculative", gamma=gamma, **dict.fromkeys(["rule", "alpha", *CASCADE, *CERTIFIED]))


Known = tuple[plan.Costs, plan.Costs] | None


def planned(
    made_by: Cascading, module: Module, engine: Engine, context: Context, notes: Notes, known: Known = None
) -> Module:
    """With measured costs and the gamma that pays; alone, a small model goes on while it is sure, whatever pays."""
    assert module.decode is not None
    if module.decode.strategy == "speculative":
        drafter = replace(made_by.drafter(), gamma=made_by.gamma)
        return plan.foreseen(drafter, module, engine, context, notes, known)
    costs = plan.measure(plan.decoding(engine, module), int(str(module.decode.attrs["gamma"])))
    notes.chose(f"a token of the small model costs {costs.draft:.3f} steps of the large one")
    return with_decode(
        module, "cascade", curve=tuple(round(c, 3) for c in costs.curve), cost=round(costs.draft, 4)
    )  # fmt: skip


def _strategy(module: Module) -> str:
    assert module.decode is not None
    return module.decode.strategy


def _faster(
    made_by: Cascading, module: Module, told: dict[str, Any], engine: Engine, prompts: Prompts, context: Context,
    notes: Notes,
) -> tuple[Module, dict[str, float]]:  # fmt: skip
    """The cascade with its promise, or plain speculation where that is as fast; speeds of both."""
    aside, bare = Notes(), without(module)
    known = plan.timed(replace(made_by.drafter(), gamma=made_by.gamma), bare, engine)
    plainly = planned(made_by, bare, engine, context, aside, known)
    cascade = with_decode(planned(made_by, module, engine, context, notes, known), _strategy(module), **told)
    notes.choices += [f"plain speculation: {line}" for line in aside.choices if line.startswith(("gamma", "declined"))]
    alone = Engine(replace(engine.program, decode={}), engine.params, engine.eos)
    ways = {PLAIN: alone, SPECULATION: plan.decoding(engine, plainly), CASCADED: plan.decoding(engine, cascade)}
    speeds = prompts.race(ways)
    shown = f"x{speeds[CASCADED]:.2f} of {PLAIN}, {SPECULATION} x{speeds[SPECULATION]:.2f}"
    if speeds[CASCADED] > max(1.0, speeds[SPECULATION]) or made_by.force:
        notes.chose(f"{CASCADED}: {shown}, on the same prompts in turn")
        return with_decode(cascade, _strategy(cascade), measured=round(speeds[CASCADED], 3)), speeds
    notes.chose(f"plain speculation: {CASCADED} is not faster, {shown} (force=true cascades all the same)")
    drafts = int(str(plainly.decode.attrs["gamma"])) if plainly.decode else 0
    return with_decode(plainly, "speculative", measured=round(speeds[SPECULATION], 3) if drafts else None), speeds


def _numbers(
    rule: str,
    found: Certificate,
    speaking: Speaking,
    speeds: dict[str, float],
    curve: Curve,
    notes: Notes,
    started: float,
) -> dict[str, Any]:
    """For report.json."""
    tried = [
        {"alpha": t.setting, "loss": t.mean, "p": t.p, "certified": t.passed} | speaking.told[t.setting]
        for t in found.tried
    ]
    return {
        "kind": "cascade", "rule": rule, "certified": found.chosen, "delta": found.delta, "epsilon": found.epsilon,
        "n": found.n, "needed": found.needed, "reason": found.reason("alpha"), "tried": tried, "speeds": speeds,
        "curve": curve, "summary": [*notes.choices, *summary(curve)], "seconds": time.perf_counter() - started,
    }  # fmt: skip


__all__ = ["by_hand", "by_rule", "planned", "without"]
