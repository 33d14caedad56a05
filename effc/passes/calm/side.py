"""What is told of exits beside the certificate: how often each is right, and what a batch of texts gains by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.ir.core import Attr, Module, Op
from effc.ir.ops import attribute
from effc.ir.rewrite import replace_ops
from effc.passes.calm.train import early_name, with_exits
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.weights import Store

if TYPE_CHECKING:
    from effc.passes.context import Context

TOGETHER = 8
"""Texts of the batch that is timed, two rounds of them."""

BATCH = 25
"""Texts that are read together."""


def agreement(
    module: Module, store: Store, context: Context, prompts: Sequence[list[int]], full: Sequence[list[int]]
) -> dict[int, float]:
    """By layers: how often the exit after them says what the full model said, on the full model's own texts."""
    wide, count = with_exits(module)
    model = context.model(wide, store)
    whole: Callable[..., Any] = model.program.extend
    extend = jax.jit(lambda params, tokens: [x.argmax(-1) for x in whole(params, tokens)[: count + 1]])
    right, said = np.zeros(count), 0
    rows = [[*prompt, *text] for prompt, text in zip(prompts, full, strict=True)]
    length = max(map(len, rows))
    tokens = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    for start in range(0, len(rows), BATCH):
        last, *exits = map(np.asarray, extend(model.params, jnp.asarray(tokens[start : start + BATCH])))
        for i, row in enumerate(rows[start : start + BATCH]):
            new = slice(len(prompts[start + i]), len(row) - 1)  # the first new token comes with the prompt
            right += [np.sum(exit[i, new] == last[i, new]) for exit in exits]
            said += max(0, len(row) - 1 - new.start)
    return {place: float(share) for place, share in zip(places(module), right / max(said, 1), strict=True)}


def places(module: Module) -> list[int]:
    """Layers before each exit."""
    (op,) = (op for op in module.funcs[early_name(module)].ops if op.kind == "early")
    at = attribute(op, "exits")
    assert isinstance(at, tuple)
    return [int(str(place)) for place in at]


def together(
    module: Module, store: Store, context: Context, prompts: Sequence[list[int]], tokens: int, threshold: float
) -> dict[str, float]:
    """What a batch gains by exits at this threshold, tokens/s over the full model's: each row by itself, or all
    waiting for the least sure. The best of two rounds of each, in turn."""
    engines: dict[str, Engine] = {}
    for rows in ("masked", "wait"):
        model = context.model(altered(module, {"rows": rows}), store)
        engines[rows] = Engine(model.program, model.params)
    ways = {"full": (engines["masked"], 1.0), **{rows: (engine, threshold) for rows, engine in engines.items()}}
    best = dict.fromkeys(ways, 0.0)
    for number in range(3):
        for name, (engine, at) in ways.items():
            batch = list(prompts[:TOGETHER])
            stats = generate(engine, batch, max_new_tokens=tokens, exits=at, stop_ids=()).stats
            best[name] = max(best[name], stats.decode_rate) if number else 0.0  # the first round compiles
    return {rows: best[rows] / best["full"] for rows in engines}


def altered(module: Module, attrs: Mapping[str, Attr]) -> Module:
    """The module with other attributes of its `early`; certified for nothing."""

    def other(op: Op) -> list[Op] | None:
        return [replace(op, attrs={**op.attrs, **attrs})] if op.kind == "early" else None

    return module.with_func(replace_ops(module.funcs[early_name(module)], other))
