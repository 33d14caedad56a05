"""What routing wins: how deep tokens go, tokens/s and keys against the same arrays with every token at every depth."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from effc.ir.core import Module, Op
from effc.ir.ops import attribute
from effc.ir.rewrite import replace_ops
from effc.passes.base import Notes
from effc.passes.mor.choose import SEQUENCES
from effc.passes.mor.route import ROUTER
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.recursion import mean_depth
from effc.weights import Store

if TYPE_CHECKING:
    from effc.passes.context import Context

ROUNDS = 5
"""How often both are timed, in turn."""


def routed(module: Module, store: Store, context: Context, notes: Notes) -> None:
    """Measures the module against its plain recursion and says what was found."""
    tokens, times = context.prompts(SEQUENCES, context.window), recursion(module).attrs["times"]
    mine, other = engine(module, store, context), engine(plain(module), store, context)
    deep, gain = depth(mine, tokens), speed(mine, other, tokens[0].tolist())
    kept = cache_bytes(mine, context.window) / cache_bytes(other, context.window)
    wanted = cache_share(module)
    notes.chose(f"tokens run {deep:.2f} of {times} recursions on average, of the text that was trained on")
    notes.chose(f"decoding x{gain:.2f} tokens/s against the same arrays with every token in every recursion")
    notes.chose(f"keys and values of {context.window} tokens x{kept:.3f} against those (by formula x{wanted:.3f})")
    told = {"depth": deep, "gain": gain, "cache": kept, "cache_by_formula": wanted}
    notes.measured = {"kind": "routers", **told, "summary": list(notes.choices)}


def engine(module: Module, store: Store, context: Context) -> Engine:
    """Ready to run."""
    model = context.model(module, store)
    return Engine(model.program, model.params)


def recursion(module: Module) -> Op:
    """The routed op."""
    return next(op for op in module.forward().ops if op.kind == "recurse")


def plain(module: Module) -> Module:
    """The module with every token in every recursion, without routers."""
    routed = recursion(module)
    runs = _number(routed, "times") * _number(routed, "span")
    attrs = {"block": routed.attrs["block"], "times": runs} | {
        name: attribute(routed, name) for name in ("start", "order")
    }
    whole = replace(routed, kind="repeat", params={}, attrs=attrs)
    after = module.with_func(replace_ops(module.forward(), lambda op: [whole] if op is routed else None))
    return replace(after, params={name: param for name, param in after.params.items() if name != ROUTER})


def _number(op: Op, name: str) -> int:
    value = attribute(op, name)
    assert isinstance(value, int)
    return value


def depth(machine: Engine, tokens: np.ndarray) -> float:
    """How many recursions tokens i32[n,t] run on average, as decoding routes them."""
    _, cache = machine.extend(jnp.asarray(tokens), machine.empty(*tokens.shape))
    return float(mean_depth(cache))


def speed(one: Engine, other: Engine, prompt: list[int]) -> float:
    """Tokens a second of the one over those of the other: the median of rounds in which both take turns."""
    half = max(1, len(prompt) // 2)
    ratios = [_rate(one, prompt[:half], half) / _rate(other, prompt[:half], half) for _ in range(ROUNDS + 1)]
    return median(ratios[1:])  # the first compiles


def _rate(machine: Engine, prompt: list[int], new: int) -> float:
    return generate(machine, [prompt], max_new_tokens=new, stop_ids=()).stats.decode_rate


def cache_bytes(machine: Engine, tokens: int) -> int:
    """Of one sequence with room for so many tokens."""
    return sum(x.nbytes for x in jax.tree.leaves(machine.empty(1, tokens).entries))


def cache_share(module: Module) -> float:
    """What the formulas say: (N+1)/2N of a recursion's keys for evenly falling shares, 1/N where they are shared."""
    routed, span = recursion(module), _number(recursion(module), "span")
    shares = attribute(routed, "capacity")
    assert isinstance(shares, tuple)
    outside = sum(_number(op, "times") for op in module.forward().ops if op.kind == "repeat")
    kept = 1.0 if attribute(routed, "kv") == "shared" else sum(float(str(share)) for share in shares)
    return (outside + span * kept) / (outside + span * len(shares))
