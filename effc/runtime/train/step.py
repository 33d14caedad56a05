"""One step of training as one compiled program: gradients over the parts of a batch, then the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effc.runtime.layers import learning
from effc.runtime.train import needs
from effc.runtime.train.plan import COUNT, Batch, Loss, Metrics, Plan, Tick, Tree
from effc.runtime.train.tree import put

State = dict[str, Any]
"""weights: trained leaves by path; optimizer: what optax keeps of them."""

MUON_RMS = 0.2
"""Mean size of Muon's steps, about AdamW's (Liu et al. 2025, section 2.2): one learning rate goes for both."""

Step = Callable[[State, Tree, Batch, Tick, jax.Array], tuple[State, jax.Array, Metrics]]
"""(state, all parameters, batch, tick, learning rate) -> (state, loss, metrics); the state given is used up."""


def optimizer(plan: Plan) -> Any:
    """What the plan names, without its learning rate, which the step gives; only matrices decay."""
    optax = needs.optax()
    clip = optax.clip_by_global_norm(plan.clip) if plan.clip else optax.identity()
    return optax.chain(clip, *(_muon(optax, plan) if plan.optimizer == "muon" else _adamw(optax, plan)))


def _adamw(optax: Any, plan: Plan) -> list[Any]:
    matrices: Callable[[Tree], Tree] = lambda weights: jax.tree.map(lambda x: x.ndim > 1, weights)  # noqa: E731
    return [
        optax.scale_by_adam(plan.b1, plan.b2, mu_dtype=jnp.float32),
        optax.add_decayed_weights(plan.weight_decay, matrices),
    ]


def _muon(optax: Any, plan: Plan) -> list[Any]:
    """Of matrices; what has other shapes goes by Adam. It takes its rate off, a step does so again: hence the sign."""
    betas = {"adam_b1": plan.b1, "adam_b2": plan.b2, "mu_dtype": jnp.float32}
    muon = optax.contrib.muon(1.0, weight_decay=plan.weight_decay, consistent_rms=MUON_RMS, **betas)
    return [muon, optax.scale(-1.0)]


def compiled(loss: Loss, make: Any, mask: Tree, plan: Plan) -> Step:
    """The step, compiled when first called."""

    def call(state: State, rest: Tree, batch: Batch, tick: Tick, lr: jax.Array) -> tuple[State, jax.Array, Metrics]:
        weights = state["weights"]
        with learning():
            told, metrics, grads = _gradients(loss, weights, rest, mask, batch, tick, plan.accumulate)
        updates, inner = make.update(grads, state["optimizer"], weights)
        moved = jax.tree.map(lambda w, u: (w - lr * u).astype(w.dtype), weights, updates)
        return {"weights": moved, "optimizer": inner}, told, metrics

    return jax.jit(call, donate_argnums=0)


def _gradients(
    loss: Loss, weights: Tree, rest: Tree, mask: Tree, batch: Batch, tick: Tick, parts: int
) -> tuple[jax.Array, Metrics, Tree]:
    """Loss, metrics and gradients of the batch, a part of it at a time, each weighted by its count."""

    def part(weights: Tree, piece: Batch, tick: Tick) -> tuple[jax.Array, Metrics]:
        return loss(put(rest, weights, mask), piece, tick)

    def one(piece: Batch, tick: Tick) -> tuple[jax.Array, Any]:
        (told, metrics), grads = jax.value_and_grad(part, has_aux=True)(weights, piece, tick)
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        count = metrics[COUNT] if COUNT in metrics else jnp.float32(1)
        return count, jax.tree.map(lambda x: x * count.astype(x.dtype), (told, metrics, grads))

    if parts == 1:
        count, sums = one(batch, tick)
    else:
        pieces = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)
        keys = jax.random.split(tick.key, parts)

        def add(total: Any, piece: Any) -> tuple[Any, None]:
            more = one(piece[0], Tick(piece[1], tick.step, tick.progress))
            return jax.tree.map(jnp.add, total, more), None

        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces), tick)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (count, sums), _ = lax.scan(add, zeros, (pieces, keys))
    whole = jnp.maximum(count, 1e-9)
    told, metrics, grads = jax.tree.map(lambda x: x / whole.astype(x.dtype), sums)
    return told, _named(metrics, count), grads


def _named(metrics: Metrics, count: jax.Array) -> Metrics:
    """With the whole batch's count in place of the parts' mean."""
    return {**metrics, COUNT: count} if COUNT in metrics else metrics
