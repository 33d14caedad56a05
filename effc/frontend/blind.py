"""Queries that see no key: a mask that reads the tokens may hide all of them, as from padding.

What a softmax over nothing gives is an accident of how the mask was written, often the mean of all
values, later ones too. Such tokens have no meaning as queries; prompts to compare with have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from effc.ir.core import Module, Op, walk
from effc.ir.interpret import Context, Weight, evaluate_func
from effc.ir.ops import rows_beside
from effc.ir.stream import Reads, Watch, look, params_of, weight
from effc.runtime.layers import score_bias, visible

HIDDEN = -1e4
"""A score this low counts as hidden."""

TURNS = 8
"""How often tokens that see nothing are drawn again."""


def seeing(module: Module, store: Mapping[str, Reads], ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """ids[b,t] with other tokens, where there are some, in place of those that see no key."""
    if not any(_rows(op) for func in module.funcs.values() for op in walk(func)):
        return ids
    for _ in range(TURNS):
        hidden = blind(module, store, ids)
        if not hidden.any():
            break
        ids = np.where(hidden, rng.integers(0, int(module.meta["vocab"]), ids.shape, ids.dtype), ids)
    return ids


def blind(module: Module, store: Mapping[str, Reads], ids: np.ndarray) -> np.ndarray:
    """bool[b,t]: which tokens see no key, not even their own, in some layer and head."""
    forward = module.forward()
    reading = {f.name: [op for op in f.ops if _rows(op)] for f in module.funcs.values()}
    names = {name: list(dict.fromkeys(n for op in ops for n in op.inputs[3:])) for name, ops in reading.items() if ops}
    known: dict[tuple[str, int], dict[str, Array]] = {(forward.name, 0): {forward.inputs[0].name: jnp.asarray(ids)}}

    def see(func: str, layer: int, values: Mapping[str, Array]) -> None:
        known.setdefault((func, layer), {}).update(values)

    look(module, store, [jnp.asarray(ids)], Watch(names, see))
    found = np.zeros(ids.shape, bool)
    for (func, layer), values in known.items():
        for op in reading[func]:
            weights = _weights(module, store, op, layer)
            found |= _hidden(op, [values[n] for n in op.inputs[3:]], weights, ids.shape)
    return found


def _rows(op: Op) -> int:
    """Operands that hold a row for each token."""
    return sum(rows_beside(op)) if op.kind == "attention" else 0


def _weights(module: Module, store: Mapping[str, Reads], op: Op, layer: int) -> dict[str, Weight]:
    return {n: weight(store[n], layer if module.params[n].stack else 0) for n in params_of([op])}


def _hidden(op: Op, extra: Sequence[Array], weights: Mapping[str, Weight], shape: tuple[int, ...]) -> np.ndarray:
    """bool[b,t]: tokens from which the bias hides every key up to their own."""
    b, t = shape
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    context = Context({"b": b, "t": t}, positions)
    keyed, rows = rows_beside(op)[0], _rows(op)

    def bias(*scalars: Array) -> Array:
        return evaluate_func(op.regions["bias"], (*scalars, *extra[rows:]), weights, context)[0]

    added = score_bias(bias, positions, t, _heads(op), extra[:keyed], extra[keyed:rows])
    return np.asarray(jnp.where(visible(positions, t)[:, None], added, -jnp.inf).max(-1).min(1) <= HIDDEN)


def _heads(op: Op) -> int:
    heads = op.out.type.shape[2]
    assert isinstance(heads, int)
    return heads
