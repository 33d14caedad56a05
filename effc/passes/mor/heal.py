"""Healing of folded layers: distillation from the model they were folded from, beside an honest baseline.

The baseline is what sharing has to beat: a model of the same unique size that simply has fewer layers,
healed by the same loss, data and budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from effc.ir.core import Module
from effc.passes.layers import layer_store, stack_of, with_layers
from effc.passes.mor.choose import SEQUENCES, gap
from effc.passes.mor.route import ROUTER
from effc.passes.mor.sharing import kept
from effc.runtime import routing
from effc.runtime.train import Budget, Fitted, Plan, Tick, chosen, forward_kl, mean
from effc.weights import Store

if TYPE_CHECKING:
    from effc.passes.context import Context, Model

ROWS = 4
"""Sequences a step."""

LEARNING_RATE = 1e-3

AUXILIARY = 0.1
"""Weight of the routers' own loss: published recipes take 1e-3 over billions of tokens, a short healing needs more."""

ANNEAL = (0.2, 0.6)
"""Progress at which the share of tokens begins to fall, and at which it is what decoding allows."""


def heal(module: Module, store: Store, context: Context) -> tuple[Fitted, Store]:
    """Trained arrays: forward KL to the input model, all parameters of the folded one."""
    model = context.model(module, store)
    fitted = distill(model, context, _trained(model, context.teacher_module), "folded")
    return fitted, model.store(fitted.params["student"], store)


def baseline(unique: int, context: Context, healed: Fitted, same: Literal["steps", "minutes"]) -> Fitted:
    """The same training of the input model with only `unique` of its layers, as long as the folded one had."""
    layers, module, store = best_dropped(unique, context)
    steps, minutes = healed.steps, healed.seconds / 60
    budget = Budget(steps=steps) if same == "steps" else Budget(minutes=minutes)
    title = f"layers {', '.join(map(str, layers))} alone"
    return distill(context.model(module, store), replace(context, budget=budget), True, title)


def distill(model: Model, context: Context, mask: Any, title: str) -> Fitted:
    """The student after its budget; teacher and student lie in one tree, the teacher's half is frozen."""
    teacher = context.teacher

    target = shares(model.module)

    def loss(tree: Any, batch: Mapping[str, Any], tick: Tick) -> tuple[jax.Array, dict[str, jax.Array]]:
        ids = batch["tokens"][:, :-1]
        told = teacher.program.forward(tree["teacher"], ids)
        with routing.train([annealed(share, tick.progress) for share in target]) as routers:
            said = model.program.forward(tree["student"], ids)
        apart = mean(forward_kl(told, said), batch["mask"])
        metrics = {f"on_{depth}": share for depth, share in enumerate(routers.shares, 1)}
        more = AUXILIARY * sum(routers.losses, jnp.zeros(()))
        return apart + more, {"count": batch["mask"].sum(), "kl": apart, **metrics}

    look = context.looks(model.program)
    return context.fit(
        loss,
        {"student": model.params, "teacher": teacher.params},
        context.batches_beside(ROWS),
        Plan(context.budget, lr=LEARNING_RATE, seed=context.seed),
        trainable={"student": mask, "teacher": False},
        evaluate=lambda tree: look(tree["student"]),
        tag=title,
        title=f"mor: {title}",
    )


def shares(module: Module) -> tuple[float, ...]:
    """Of the tokens, what each depth is to take; nothing where none are routed."""
    found = [op.attrs["capacity"] for op in module.forward().ops if op.kind == "recurse"]
    return tuple(float(str(share)) for share in found[0]) if found and isinstance(found[0], tuple) else ()


def annealed(share: float, progress: jax.Array) -> jax.Array:
    """All tokens at first, so that training begins at the plain recursion; then down to `share`."""
    begin, end = ANNEAL
    return 1 - (1 - share) * jnp.clip((progress - begin) / (end - begin), 0, 1)


def _trained(model: Model, original: Module) -> Any:
    """The input model's parameters and the deltas of its matrices; not what other passes have added."""
    own = {*original.params, ROUTER, *(f"{name}.{part}" for name in original.params for part in "ab")}
    return chosen(model.program.params, "|".join(name for name in model.module.params if name in own))


# ---- the baseline


def best_dropped(unique: int, context: Context) -> tuple[list[int], Module, Store]:
    """Of some ways to keep `unique` layers the one that is nearest to the input model on training text."""
    module, store = context.teacher_module, context.teacher_store
    _, _, layers = stack_of(module)
    found = [(ids, with_layers(module, ids), layer_store(module, ids, store)) for ids in candidates(layers, unique)]
    tokens = context.batches(SEQUENCES)(0, None)["tokens"][:, :-1]
    gaps = [gap(context.teacher, context.model(after, made), tokens) for _, after, made in found]
    return found[int(np.argmin(gaps))]


def candidates(layers: int, count: int) -> list[list[int]]:
    """Evenly spaced layers, or all but some neighbours in the middle; first and last always stay."""
    gone, whole = layers - count, list(range(layers))
    runs = [whole[:at] + whole[at + gone :] for at in range(1, layers - gone)]
    return [kept(whole, count), *runs[:: max(1, len(runs) // 4)]]
