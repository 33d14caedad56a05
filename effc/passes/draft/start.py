"""A head's beginning in closed form: what it reads, turned into what the target makes of the next token.

Its readers are linear, and what they should give is known: the target's last features one token on. So they are
solved for, by ridge regression over the whole lesson, with the layer after them adding nothing yet. The second
step, from features of its own, is solved for together with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from effc.ir.core import Decode, Func, Module, Ref, walk
from effc.ir.rewrite import prune, users
from effc.passes.draft.head import READS, TOKENS
from effc.passes.draft.lesson import Lesson, learned
from effc.passes.draft.parts import PREFIX, cut, made
from effc.passes.ridge import Sums
from effc.weights import Store

if TYPE_CHECKING:
    from effc.passes.context import Context

WIDEST = 8192
"""Inputs up to which it is solved: the work grows with the cube of them."""

ENOUGH = 200_000
"""Rows that are summed of a step, of as many chunks as that takes: they are a hundred times the unknowns."""

Embed = Callable[[np.ndarray], np.ndarray]
"""Tokens i32[n,t] as the layers read them."""


def begun(name: str, module: Module, store: Store, lesson: Lesson, context: Context) -> Store:
    """The store with the readers solved for and the layer silent; as it was where that is no linear matter."""
    parts = cut(name, module)
    silent, width = outgoing(module, parts.width), parts.width
    count = int(lesson.chunks[0]["features"].shape[-1]) + width
    if not silent or count > WIDEST:
        return store
    model = context.model(embedding(name, module), store)
    entry = jax.jit(model.program.forward)
    readers = solved(lesson, lambda tokens: np.asarray(entry(model.params, tokens)), width)
    blocks = [*range(count // width - 1), TOKENS]
    fresh = [
        made(module.params[f"{READS}.{which}.w"], lambda at=at: {"": readers[at * width : (at + 1) * width]})
        for at, which in enumerate(blocks)
    ]
    quiet = [made(module.params[n], lambda n=n: {"": np.zeros(_shape(module, n), np.float32)}) for n in silent]
    return store.replace([*fresh, *quiet], module)


def embedding(name: str, module: Module) -> Module:
    """A module that only embeds tokens, as the layers read them."""
    parts = cut(name, module)
    func = prune(Func(PREFIX, parts.func.inputs, parts.before, (parts.loop.inputs[0],)))
    read = {n for op in walk(func) for n in op.params.values()}
    params = {n: p for n, p in module.params.items() if n in read}
    return Module(module.name, module.meta, params, {PREFIX: func}, Decode("greedy", {"forward": Ref(PREFIX)}))


def outgoing(module: Module, width: int) -> list[str]:
    """The head's matrices whose products are only added to what goes past them: zeros there leave the layer silent."""
    func = module.funcs[PREFIX]
    after, found = users(func), list[str]()
    for op in func.ops:
        mine = [n for n in op.params.values() if n.startswith(f"{PREFIX}.") and not n.startswith(f"{READS}.")]
        if op.kind == "linear" and mine and op.out.type.shape[-1] == width:
            found += mine if [u.kind for u in after[op.out.name]] == ["lax.add"] else []
    return found


def solved(lesson: Lesson, embed: Embed, width: int) -> np.ndarray:
    """f32[k,d]: readers for the first step, then for it and the second, which reads what the first one made."""
    first = _summed(lesson, embed, width, None)
    second = _summed(lesson, embed, width, first.solved()[0])
    return (first + second).solved()[0]


def _summed(lesson: Lesson, embed: Embed, width: int, readers: np.ndarray | None) -> Sums:
    total = Sums.of(*rows(lesson.chunks[0], embed, width, readers))
    for chunk in lesson.chunks[1:]:
        if total.rows >= ENOUGH:
            break
        total += Sums.of(*rows(chunk, embed, width, readers))
    return total


def rows(
    chunk: Mapping[str, np.ndarray], embed: Embed, width: int, readers: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [n,k] and what they should give [n,d]: of the first step, or with readers of the second."""
    tokens, steps = chunk["tokens"], 1 if readers is None else 2
    features = np.asarray(chunk["features"], np.float32)
    pieces = [_normed(part) for part in np.split(features, features.shape[-1] // width, axis=-1)]
    last, told = pieces[-1], _normed(embed(tokens))
    if readers is not None:
        own = _normed(np.concatenate([*(p[:, :-1] for p in pieces), told[:, 1:]], axis=-1) @ readers)
        pieces, told, last, tokens = [own] * len(pieces), told[:, 1:], last[:, 1:], tokens[:, 1:]
    x = np.concatenate([*(p[:, : tokens.shape[1] - 1] for p in pieces), told[:, 1:]], axis=-1)
    there = learned(chunk["spans"], chunk["tokens"].shape[1])[:, steps:]
    return x[there], last[:, 1:][there]


def _normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def _shape(module: Module, name: str) -> tuple[int, ...]:
    return tuple(int(str(size)) for size in module.params[name].type.shape)


__all__ = ["begun"]
