"""What every model is held to, one function a check: AssertionError or EffcError, else a word for the table."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.backend.to_python import emit, load_program
from effc.frontend import lower
from effc.frontend.source import load_all
from effc.ir.core import Func, Module, Op, walk
from effc.ir.tokens import token_axes
from effc.ir.types import Quant
from effc.passes import runner
from effc.pipeline import Pipeline
from effc.runtime.cache import cache_shapes, empty_cache
from effc.runtime.qarray import QArray
from effc.runtime.weights import load_params
from effc.weights import write_safetensors
from tests.conformance.models import Model

SHAPES = ((1, 5), (2, 17), (3, 40))  # batch, length; the last is longer than any window
STEPS = 24
LENGTHS = np.array((13, 5, 16), np.int32)  # prompts of one ragged batch

EXACT = 1e-4
"""Largest difference of logits as a part of their range: f32 sums in other orders."""

FACTOR = 2.0
"""With 8-bit weights, logits may be so many times as far as weights with random errors of half a step put them."""

LEFT = frozenset({
    "window", "lax.dot_general", "lax.rsqrt", "lax.gather", "lax.exp", "lax.dynamic_slice",
    "lax.conv_general_dilated", "lax.cumsum",
})  # fmt: skip
"""What is there where an attention, a norm, a linear or an embedding was not raised."""


NEAR = frozenset({"lax.conv_general_dilated"})
"""Of these, what may stand in a window of a few tokens."""


class Case:
    """A model with what the checks share: its module, and its emitted program with weights."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.source = model.build()
        self.forward = jax.jit(self.source.forward)
        self.params = load_all(self.source)
        self.tokens = np.random.default_rng(1).integers(0, 97, (3, 40), np.int32)

    @cached_property
    def lowered(self) -> Any:
        return lower(self.source)

    @cached_property
    def emitted(self) -> tuple[Any, Any]:
        return self.written(self.lowered.module, self.lowered.store, "exact")

    @cached_property
    def exactly(self) -> Any:
        """The emitted program's forward, compiled."""
        return jax.jit(self.emitted[0].forward)

    @cached_property
    def whole(self) -> np.ndarray:
        """The model's own logits of all tokens."""
        return np.asarray(self.forward(self.params, jnp.asarray(self.tokens)))

    def written(self, module: Module, store: Any, name: str) -> tuple[Any, Any]:
        """The emitted program and its weights, through a file as an artifact has it."""
        path = self.folder / f"{name}.safetensors"
        write_safetensors(path, module, store)
        program = load_program(emit(module))
        return program, load_params(path, program.params)


def raised(case: Case) -> str:
    """Nothing is left of what has an op of its own; as many attentions as layers; the stack is one repeat."""
    module = case.lowered.module
    assert not case.lowered.notes, case.lowered.notes
    left = {op.kind for func in module.funcs.values() for op in _unraised(func)} & LEFT
    assert left <= case.model.routing, f"left: {', '.join(sorted(left - case.model.routing))}"
    found = Counter(op.kind for op in unrolled(module))
    wanted = case.model.layers * case.model.heads
    assert found["attention"] == wanted, f"{found['attention']} attentions, want {wanted}"
    return ", ".join(f"{found[kind]} {kind}" for kind in ("attention", "norm", "linear", "embed"))


def _unraised(func: Func) -> Iterator[Op]:
    """Ops that hold tokens, but those of what attentions add to their scores; a window of a few tokens, as a shift
    or a short convolution is, is looked into and counts for nothing itself."""
    known = func.types()
    for op in func.ops:
        near = op.kind == "window" and op.attrs.get("lookback", -1) != -1
        if not near and any(token_axes(known[value.name]) for value in op.outputs):
            yield op
        for region in op.regions.values() if op.kind != "attention" else ():
            yield from (inner for inner in _unraised(region) if not (near and inner.kind in NEAR))


def unrolled(module: Module) -> Iterator[Op]:
    """Ops of the forward, those of blocks as often as they run."""
    for op in module.forward().ops:
        if op.kind == "repeat":
            yield from [*module.funcs[str(op.attrs["block"]).lstrip("@")].ops] * _times(op)
        else:
            yield op


def _times(op: Op) -> int:
    times = op.attrs["times"]
    assert isinstance(times, int)
    return times


def rolled(case: Case) -> str:
    """The first repeat holds every whole unit of layers; only what is left of a last unit stands beside it."""
    module, unit, layers = case.lowered.module, case.model.unit, case.model.layers
    forward, heads = module.forward(), case.model.heads
    held = [(_times(op), _attentions(module.funcs[str(op.attrs["block"]).lstrip("@")])) for op in _repeats(forward)]
    assert held[:1] == [(layers // unit, unit * heads)], (
        f"times, attentions: {held}, want {layers // unit}, {unit * heads}"
    )
    apart = _attentions(forward) + sum(times * n for times, n in held[1:])
    assert apart == layers % unit * heads, f"{apart} attentions beside the {layers // unit} times {unit}"
    return f"{layers // unit} times" + (f" {unit}" if unit > 1 else "") + (f" and {apart}" if apart else "")


def _repeats(func: Func) -> list[Op]:
    return [op for op in func.ops if op.kind == "repeat"]


def _attentions(func: Func) -> int:
    return sum(op.kind == "attention" for op in func.ops)


def logits(case: Case) -> str:
    """The emitted program's are the module's own, at each shape."""
    params, worst = case.emitted[1], 0.0
    for b, t in SHAPES:
        tokens = jnp.asarray(case.tokens[:b, :t])
        worst = max(worst, differ(case.exactly(params, tokens), case.forward(case.params, tokens)))
    assert worst <= EXACT, f"logits differ by {worst:.1e} of their range"
    return f"{worst:.0e}"


def decoding(case: Case) -> str:
    """Token after token in a ragged batch, what the model's own forward of the whole says."""
    program, params = case.emitted
    extend, rows, at = jax.jit(program.extend), np.arange(3), LENGTHS.copy()
    cache = empty_cache(cache_shapes(program.extend, params, 3), case.tokens.shape[1] + 1)
    made, cache = extend(params, jnp.asarray(case.tokens[:, : at.max()]), cache, jnp.asarray(at))
    span, worst = np.abs(case.whole).max(), 0.0
    for _ in range(STEPS):
        worst = max(worst, differ(made[:, -1], case.whole[rows, at - 1], span))
        made, cache = extend(params, jnp.asarray(case.tokens[rows, at][:, None]), cache)
        at += 1
    assert worst <= EXACT, f"step by step, logits differ by {worst:.1e} of their range"
    return f"{worst:.0e}"


def quant8(case: Case) -> str:
    """Every linear's weights are coded; the emitted program gives what the decoded weights give, and the logits
    are no farther than random errors of the size that the codes allow, half a step, would put them."""
    module, store = quantized(case)
    weights = {op.params["w"] for func in module.funcs.values() for op in walk(func) if op.kind == "linear"}
    assert weights, "no linears"
    plain = {name for name in weights if not isinstance(module.params[name].type.dtype, Quant)}
    plain = {name for name in plain if not (case.model.kept and fnmatch.fnmatch(name, case.model.kept))}
    assert not plain, f"not coded: {', '.join(sorted(plain))}"
    program, coded = case.written(module, store, "quant8")
    tokens, exact = jnp.asarray(case.tokens), case.emitted[1]
    made = jax.jit(program.forward)(coded, tokens)
    apart = differ(made, case.exactly(decoded(coded), tokens))
    assert apart <= EXACT, f"logits differ by {apart:.1e} of their range from those of the decoded weights"
    rng = np.random.default_rng(2)
    allowed = FACTOR * max(differ(case.exactly(near(exact, coded, rng), tokens), case.whole) for _ in range(3))
    worst = differ(made, case.whole)
    assert worst <= allowed, f"logits differ by {worst:.1e} of their range, want {allowed:.1e} at most"
    return f"{worst:.1%} of {allowed:.1%}"


def quantized(case: Case) -> tuple[Module, Any]:
    (step,) = runner.run(case.lowered.module, Pipeline.parse("quant8").ordered())
    return step.after, step.made_by.weights(step.before, step.after, case.lowered.store)


def decoded(params: Any) -> Any:
    """Arrays in place of codes."""
    return jax.tree.map(lambda x: x.dequantize() if isinstance(x, QArray) else x, params, is_leaf=is_coded)


def near(exact: Any, coded: Any, rng: np.random.Generator) -> Any:
    """The exact arrays, those that are coded moved at random within half a step, as rounding moves them.

    The codes are those of least squared error: each channel's is no more than half a step of the whole range.
    """

    def move(x: Any, was: jax.Array) -> jax.Array:
        if not isinstance(x, QArray):
            return was
        step = np.abs(replace(x, codes=jnp.ones_like(x.codes)).dequantize())
        along = -2 if np.ptp(step, axis=-2).max() == 0 else -1  # the inputs that share a scale
        apart, widest = np.asarray(was - x.dequantize()), np.abs(was).max(along) / 127.5
        assert (np.sqrt((apart**2).mean(along)) <= 0.5001 * widest).all(), "a channel is off by over half a step"
        return was + rng.uniform(-0.5, 0.5, step.shape).astype(np.float32) * step

    return jax.tree.map(move, coded, exact, is_leaf=is_coded)


def is_coded(x: Any) -> bool:
    return isinstance(x, QArray)


def differ(made: Any, wanted: Any, span: float = 0.0) -> float:
    """The largest difference as a part of the range (that of `wanted`, if none is given); infinite where not finite."""
    made, wanted = np.asarray(made, np.float64), np.asarray(wanted, np.float64)
    assert np.isfinite(wanted).all()
    worst = float(np.abs(made - wanted).max() / (span or np.abs(wanted).max()))
    return worst if np.isfinite(worst) else float("inf")


CHECKS = {check.__name__: check for check in (raised, rolled, logits, decoding, quant8)}
