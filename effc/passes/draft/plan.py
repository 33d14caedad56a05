"""The planner: what drafts cost and how often they are right, measured; what to draft, or that nothing pays.

Costs are in plain steps, T(1). A round that sends n drafts costs T(n+1)/T(1), and what making them takes;
it emits one token more than are accepted. The prediction is for the calibration prompts, greedy, a row alone.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effc.backend.to_python import emit, load_program
from effc.ir.core import Attr, Decode, Module, Ref
from effc.ir.printer import dump
from effc.passes.base import Notes
from effc.passes.draft.asking import READ, measured_on
from effc.runtime.chain import Chain
from effc.runtime.drafting import MANY
from effc.runtime.engine import Engine
from effc.runtime.generate import Drafted, generate
from effc.runtime.kernels.region.native import regions
from effc.runtime.weights import load_params
from effc.weights import Store, write_safetensors

if TYPE_CHECKING:
    from effc.passes.context import Context
    from effc.passes.draft.attach import Draft

NEW = 64
"""Tokens that follow each prompt."""

RUNS = 15
"""Timings of a call, in turn with the others. Ratios within a turn count, of these the median: how fast memory is
changes within seconds, hardly within a turn."""

ENOUGH, TURNS = 0.04, 64
"""Seconds of a timing, and calls at most: in a loop on the device as while decoding, since starting a program takes
as long as a step of a small model."""

WORTH = 1.02
"""Predicted speed-up below which drafting is declined: less is lost in what is not measured."""


@dataclass(frozen=True)
class Costs:
    """In plain steps: curve[n] a call that verifies n drafts, draft one draft token; step in seconds."""

    curve: tuple[float, ...]
    draft: float
    step: float


@dataclass(frozen=True)
class Forecast:
    """gamma drafts at most, and how much faster that should be; 1 where plain decoding is best."""

    gamma: int
    speedup: float


def planned(made_by: Draft, module: Module, store: Store, context: Context, notes: Notes) -> Module:
    """The module with costs, acceptance, gamma and the prediction in `decode`; gamma=0 where nothing pays."""
    return foreseen(made_by, module, served(module, store), context, notes)


def served(module: Module, store: Store) -> Engine:
    """The module as an artifact serves it."""
    with tempfile.TemporaryDirectory(prefix="effc-") as folder:
        file = Path(folder) / "model.safetensors"
        write_safetensors(file, module, store)
        program = load_program(emit(module))
        return Engine(program, load_params(file, program.params))


def timed(made_by: Draft, module: Module, engine: Engine) -> tuple[Costs, Costs]:
    """Of one sequence and of MANY at once; the engine is one of this program with these arrays."""
    most = _most(made_by, module)
    engine = decoding(engine, _with(module, {"gamma": most}))
    return measure(engine, most), measure(engine, most, MANY)


def _most(made_by: Draft, module: Module) -> int:
    """Drafts that are thought of at most."""
    assert module.decode is not None
    return made_by.gamma or int(str(module.decode.attrs["gamma"]))


def foreseen(
    made_by: Draft, module: Module, engine: Engine, context: Context, notes: Notes,
    known: tuple[Costs, Costs] | None = None,
) -> Module:  # fmt: skip
    """As `planned`, the engine as for `timed`. known: what that gave; then the speed-up is left to be measured."""
    most = _most(made_by, module)
    costs, many = known or timed(made_by, module, engine)
    free: dict[str, Attr | Ref] = {"curve": (1.0,) * (most + 1), "cost": 0.0}
    engine = decoding(engine, _with(module, {"gamma": most, "acceptance": _eager(module), **free}))
    prompts = measured_on(context, made_by.asks())
    levels, drafted = accepted(engine, prompts)
    found = forecast(drafted, costs, [made_by.gamma] if made_by.gamma else range(1, most + 1))
    _say(costs, drafted, found, notes)
    _say_many(many, forecast(drafted, many, range(1, most + 1)), notes)
    attrs: dict[str, Attr | Ref] = {
        "gamma": found.gamma, "curve": tuple(round(c, 3) for c in costs.curve), "cost": round(costs.draft, 4),
        "curve8": tuple(round(c, 3) for c in many.curve), "cost8": round(many.draft, 4),
        "acceptance": levels, "predicted": round(found.speedup, 3),
    }  # fmt: skip
    if found.speedup < WORTH and not made_by.force:
        notes.chose(f"declined: x{found.speedup:.2f} predicted, want x{WORTH:g} (force=true drafts all the same)")
        attrs |= {"gamma": 0}
    elif known is None:
        attrs |= {"measured": round(measured(engine, attrs, prompts), 3)}
        notes.chose(f"measured on the same prompts: x{attrs['measured']}, predicted x{found.speedup:.2f}")
    return _with(module, {**attrs, "of": fingerprint(module)})


def decoding(engine: Engine, module: Module) -> Engine:
    """One of the same program and arrays that decodes as the module says."""
    assert module.decode is not None
    attrs = {name: value.name if isinstance(value, Ref) else value for name, value in module.decode.attrs.items()}
    decode = {"strategy": module.decode.strategy, **attrs}
    return Engine(replace(engine.program, decode=decode), engine.params, engine.eos)


def measure(engine: Engine, most: int, rows: int = 1) -> Costs:
    """Times calls on 1 to most+1 tokens of each row in turn, and of a draft token where a function makes it."""
    assert engine.speculation is not None
    verify, drafter = engine.speculation.verify, engine.speculation.drafter
    calls = {size: _timed(engine, [_Call(verify, (rows, size))]) for size in _sizes(most)}
    if isinstance(drafter, Chain):
        operands = _operands(engine, rows) if drafter.features else ()
        # After a step, whose weights have pushed the drafter's out of what is close at hand; a head's first draft
        # is made in the same call.
        draft = _Call(drafter.entry, (rows, 1), operands, apart=not drafter.features)
        calls[0] = _timed(engine, [_Call(verify, (rows, 1)), draft])
    times = {size: list[float]() for size in calls}
    for _ in range(RUNS if rows == 1 else RUNS // 2):
        for size, call in calls.items():
            times[size].append(call())
    ratios = {size: float(np.median(np.divide(seconds, times[1]))) for size, seconds in times.items()}
    known = sorted(size for size in ratios if size)
    curve = np.interp(np.arange(1, most + 2), known, [ratios[size] for size in known])
    draft = max(0.0, ratios.get(0, 1.0) - 1)
    return Costs(tuple(float(c) for c in np.maximum.accumulate(curve)), draft, min(times[1]))


def _sizes(most: int) -> list[int]:
    """Call sizes that are timed; between them costs are taken to lie on lines."""
    return sorted({1, 2, (most + 1) // 2 + 1, most + 1})


def _operands(engine: Engine, rows: int) -> tuple[Any, ...]:
    """Features of one token a row, for a head."""
    assert engine.speculation is not None
    shapes = jax.eval_shape(engine.speculation.verify, engine.params, jnp.zeros((rows, 1), jnp.int32))
    return (jnp.zeros(shapes[1].shape, shapes[1].dtype),)


@dataclass(frozen=True)
class _Call:
    """A function of the program, on tokens [b,t] after a prompt's worth, and other operands of it.

    apart: what other code makes of the token before lies between it and this call.
    """

    entry: Callable[..., Any]
    shape: tuple[int, int]
    operands: tuple[Any, ...] = ()
    apart: bool = True

    def begin(self, params: Any) -> Any:
        """Tokens, operands and a cache to call it with."""
        tokens = jnp.ones(self.shape, jnp.int32)
        shapes = jax.eval_shape(self.entry, params, tokens[:, :1], *self.operands)[-1]
        zeros = jax.tree.map(lambda x: jnp.zeros((x.shape[0], 256, *x.shape[2:]), x.dtype), shapes.entries)
        cache = replace(shapes, lengths=jnp.full(self.shape[0], READ, jnp.int32), entries=zeros)
        return jax.tree.map(jnp.copy, (tokens, self.operands, cache))  # they are donated

    def turn(self, params: Any, carry: Any, said: jax.Array) -> Any:
        """Calls it; each call reads what the one before it said, [b,1]: else they would run at once, or not at all."""
        tokens, operands, cache = carry
        tokens = jnp.minimum(jnp.maximum(tokens, said), 1) if self.apart else said
        logits, *others, after = self.entry(params, tokens, *operands, cache)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, tuple(others[: len(operands)]), replace(after, lengths=cache.lengths)


def _timed(engine: Engine, calls: Sequence[_Call]) -> Callable[[], float]:
    """Seconds of these calls, one after the other; of each also the likeliest token is taken."""

    def turns(params: Any, carry: Any, count: jax.Array) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            out, said = list[Any](), carry[-1][0][:, :1]
            for call, mine in zip(calls, carry, strict=True):
                out.append(call.turn(params, mine, said))
                tokens = out[-1][0]
                said = tokens if tokens.shape[1] == 1 else tokens[:, :1]
            return out

        return lax.fori_loop(0, count, turn, carry)

    held = [[call.begin(engine.params) for call in calls]]
    ready = jax.jit(regions(turns), donate_argnums=1).lower(engine.params, held[0], jnp.int32(1)).compile()

    def run(count: int) -> float:
        start = time.perf_counter()
        held[0] = ready(engine.params, held[0], jnp.int32(count))
        held[0][0][0].block_until_ready()
        return (time.perf_counter() - start) / count

    run(1)
    count = max(1, min(TURNS, int(ENOUGH / run(1))))
    return lambda: run(count)


def accepted(engine: Engine, prompts: Sequence[list[int]]) -> tuple[tuple[float, ...], Drafted]:
    """How often drafts of each level were right, and what drafts of full length came to, on these prompts."""
    result = generate(engine, prompts, max_new_tokens=NEW, stop_ids=())
    assert result.stats.draft is not None and result.stats.levels is not None
    return result.stats.levels, result.stats.draft


def forecast(drafted: Drafted, costs: Costs, gammas: Sequence[int] | range) -> Forecast:
    """The gamma that promises most: of drafts that reached a position the share accepted there, multiplied up."""
    best = Forecast(max(gammas), 0.0)
    reach, tokens = 1.0, 1.0
    for n, (tried, right) in enumerate(zip(drafted.drafted_at, drafted.accepted_at, strict=True), 1):
        before = drafted.accepted_at[n - 2] if n > 1 else tried
        reach *= right / before if before else 0.0
        tokens += reach
        speedup = tokens / (costs.curve[n] + n * costs.draft)
        if n in gammas and speedup > best.speedup:
            best = Forecast(n, speedup)
    return best


def measured(engine: Engine, attrs: dict[str, Attr | Ref], prompts: Sequence[list[int]]) -> float:
    """Tokens a second with the drafter over those without, in turn on the same prompts, one at a time."""
    program = engine.program
    plain = Engine(replace(program, decode={}), engine.params)
    drafts = Engine(replace(program, decode={**program.decode, **attrs}), engine.params)
    ratios = list[float]()
    for prompt in [prompts[0], *prompts]:
        rates = [generate(e, [prompt], max_new_tokens=NEW, stop_ids=()).stats.decode_rate for e in (plain, drafts)]
        ratios.append(rates[1] / rates[0])
    return statistics.median(ratios[1:])


def fingerprint(module: Module) -> str:
    """Of all that the numbers were measured on but the arrays: structure, dtypes, the drafter."""
    bare = replace(module, decode=None, meta={})
    return hashlib.sha256(dump(bare).encode()).hexdigest()[:16]


def _eager(module: Module) -> tuple[float, ...]:
    """Chances with which, where drafts cost nothing, all are sent in full: to see how often each level is right."""
    return (0.999,) * (9 if module.decode and module.decode.attrs["kind"] == "lookup" else 11)


def _with(module: Module, attrs: dict[str, Attr | Ref]) -> Module:
    assert module.decode is not None
    return replace(module, decode=Decode("speculative", {**module.decode.attrs, **attrs}))


def _say(costs: Costs, drafted: Drafted, found: Forecast, notes: Notes) -> None:
    shown = ", ".join(f"{c:.2f}" for c in costs.curve)
    notes.chose(f"T(k)/T(1), k = 1 to {len(costs.curve)}: {shown}; T(1) {1e3 * costs.step:.2f} ms")
    if costs.draft:
        notes.chose(f"a draft token costs {costs.draft:.3f} plain steps")
    by = ", ".join(f"{share:.2f}" for share in drafted.by_position)
    notes.chose(f"accepted by position: {by}; {drafted.tokens_per_call:.2f} tokens a call")
    notes.chose(f"gamma={found.gamma}: x{found.speedup:.2f} predicted")


def _say_many(costs: Costs, found: Forecast, notes: Notes) -> None:
    """What of it changes where many sequences run at once."""
    best = f"up to {found.gamma} drafts, x{found.speedup:.2f}" if found.speedup >= WORTH else "no drafts"
    shown = ", ".join(f"{c:.2f}" for c in costs.curve)
    notes.chose(f"{MANY} sequences at once: T(k)/T(1) {shown}: {best}")


__all__ = ["Costs", "Forecast", "decoding", "forecast", "foreseen", "measure", "planned", "served", "timed"]
