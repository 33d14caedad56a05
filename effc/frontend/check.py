"""Hold a lowered module against the model it came from: same logits, decoded in any chunks, nothing from the future."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import jaxpr_as_fun

from effc.errors import EffcError
from effc.frontend.blind import seeing
from effc.frontend.exactly import exactly, halved, widened
from effc.frontend.lowering import Lowered
from effc.frontend.source import Source, Weights
from effc.ir.core import Module, walk
from effc.ir.stream import Group, Reads, run_groups

TOLERANCE = 1e-4
"""Largest difference of logits, as a part of their range, in f32."""

ALIKE = 4.0
"""In half precision nothing is exact: module and model must be about as far from the module in f32, no more than
so many times farther than the other."""

ROUNDING = 2e-3
"""What rounding to half precision may put logits off anyway, as a part of their range (root mean square)."""


def check(lowered: Lowered, source: Source, tokens: np.ndarray | None = None, *, seed: int = 0) -> list[str]:
    """Raise EffcError where the module is not the model; returns what was compared, a line each.

    tokens: a line of real token ids to draw prompts from; random ids are always tried too. Tokens that see no key,
    such as padding, are drawn again: what a model makes of them may depend on later ones. The model's
    own program and the module each read all weights once.
    """
    module, traced = lowered.module, lowered.traced
    assert traced is not None
    rng = np.random.default_rng(seed)
    prompts = jnp.asarray(seeing(module, lowered.store, _prompts(module, tokens, rng), rng))
    program = jax.make_jaxpr(source.forward)(source.spec, jax.ShapeDtypeStruct(prompts.shape, jnp.int32))
    wanted = original_logits(program, traced.paths, source.weights, prompts)
    decoded = _Decoding(module, prompts)
    made, *runs = _logits(module, lowered.store, [Group([prompts]), *decoded.groups()])
    judge = _judge(module, lowered.store, prompts)
    said = judge(made, wanted, f"lowering {module.name}")
    return [f"logits {list(prompts.shape)}: {said}", decoded.compared(made, runs, judge)]


Judge = Callable[[np.ndarray, np.ndarray, str], str]
"""Says how far logits are from what is wanted, of the first positions; EffcError where that is too far."""


def _judge(module: Module, store: Mapping[str, Reads], prompts: Array) -> Judge:
    if not halved(module):
        return lambda made, wanted, where: f"differ by {compare(made, wanted, where, TOLERANCE):.1e} of their range"
    (exact,) = _logits(exactly(module), widened(module, store), [Group([prompts])])
    return lambda made, wanted, where: alike(made, wanted, exact[:, : made.shape[1]], where)


def _prompts(module: Module, tokens: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Four rows at a size that was not traced, longer than any window: real text first if there is some."""
    vocab, context = int(module.meta["vocab"]), int(module.meta["context"])
    t = min(context, max(24, _window(module) + 9))
    ids = rng.integers(0, vocab, (4, t), dtype=np.int32)
    if tokens is not None and len(tokens) >= t:
        ids[0] = tokens[:t]
    return ids


def _window(module: Module) -> int:
    """The longest attention window; lengths beyond it behave differently."""
    windows = [op.attrs.get("window", 0) for func in module.funcs.values() for op in walk(func)]
    small = [w for w in windows if isinstance(w, int) and 0 < w <= 1024]
    return max(small, default=0)


def compare(made: np.ndarray, wanted: np.ndarray, where: str, tolerance: float) -> float:
    """The largest difference as a part of the range; EffcError beyond the tolerance, or where not finite."""
    if not np.isfinite(wanted).all():
        raise EffcError(f"{where}: the model's own logits are not finite, want trained weights")
    span = float(np.max(np.abs(wanted))) or 1.0
    differ = np.abs(made.astype(np.float64) - wanted) / span
    worst = float(np.max(differ)) if np.isfinite(made).all() else float("inf")
    if worst > tolerance:
        row, place = np.unravel_index(int(np.argmax(np.nan_to_num(differ, nan=np.inf).max(-1))), differ.shape[:2])
        raise EffcError(
            f"{where}: logits differ by {worst:.1e} of their range at sequence {row}, position {place}, "
            f"want at most {tolerance:.0e}; this is a fault of effc, please report it with the model's code"
        )
    return worst


def alike(made: np.ndarray, wanted: np.ndarray, exact: np.ndarray, where: str) -> str:
    """How far both are from the exact logits at their worst position; EffcError where one is much farther."""
    if not np.isfinite(wanted).all():
        raise EffcError(f"{where}: the model's own logits are not finite, want trained weights")
    span = float(np.max(np.abs(exact))) or 1.0
    mine, theirs = (np.sqrt(np.mean((x.astype(np.float64) - exact) ** 2, -1)) / span for x in (made, wanted))
    far = float(mine.max()) if np.isfinite(made).all() else float("inf")
    limit = ALIKE * min(far, float(theirs.max())) + ROUNDING
    if max(far, float(theirs.max())) > limit:
        row, place = np.unravel_index(int(np.argmax(np.nan_to_num(np.maximum(mine, theirs), nan=np.inf))), mine.shape)
        raise EffcError(
            f"{where}: in half precision logits are off by {far:.1e} of their range, the model's by {theirs.max():.1e}"
            f", most at sequence {row}, position {place}, want them alike; this is a fault of effc, please report it "
            "with the model's code"
        )
    return f"off by {far:.1e} of their range by rounding, the model's by {theirs.max():.1e}"


def _logits(module: Module, store: Mapping[str, Reads], groups: Sequence[Group]) -> list[np.ndarray]:
    """Logits [b,t,V] of each group, its chunks joined."""
    rows = max(chunk.shape[1] for group in groups for chunk in group.chunks)
    found: list[list[np.ndarray]] = [[] for _ in groups]
    for piece in run_groups(module, store, groups, rows=rows):
        found[piece.group].append(np.asarray(piece.logits, np.float32))
    return [np.concatenate(parts, axis=1) for parts in found]


class _Decoding:
    """What decoding `tokens` must agree on: with the later half of all sequences but the first changed, and in
    chunks of one and of many."""

    def __init__(self, module: Module, tokens: Array) -> None:
        self.module, self.tokens = module, tokens
        self.count = tokens.shape[1]
        self.half = self.count // 2

    def groups(self) -> list[Group]:
        """Runs to compare with the full forward."""
        later = (self.tokens[1:, self.half :] + 1) % int(self.module.meta["vocab"])
        changed = self.tokens.at[1:, self.half :].set(later)
        rest = self.count - 2
        sizes = [1, 1, rest // 2, rest // 2, rest % 2]
        return [Group([changed]), Group(_cut(self.tokens, sizes), self.count + 3)]

    def compared(self, whole: np.ndarray, made: Sequence[np.ndarray], judge: Judge) -> str:
        """A line on how far the runs are from the full forward; EffcError where too far."""
        where = f"decoding {self.module.name}"
        moved, cached = made
        near = (10 * ROUNDING if halved(self.module) else TOLERANCE) * float(np.max(np.abs(whole)))
        if not np.allclose(moved[0], whole[0], atol=near):
            raise EffcError(
                f"{where}: logits of a sequence depend on the other sequences of its batch, want them to stand alone"
            )
        if not np.allclose(moved[:, : self.half], whole[:, : self.half], atol=near):
            raise EffcError(
                f"{where}: not causal: changing token {self.half} moved earlier logits, want a causal model"
            )
        said = judge(cached, whole[:, : cached.shape[1]], where)
        return f"decoding {list(self.tokens.shape)} in chunks: {said}"


def _cut(tokens: Array, sizes: Sequence[int]) -> list[Array]:
    out: list[Array] = []
    start = 0
    for size in sizes:
        if size > 0:
            out.append(tokens[:, start : start + size])
            start += size
    return out


# -- the original ---------------------------------------------------------------------------------------
def original_logits(program: Any, paths: Sequence[str], weights: Weights, tokens: Array) -> np.ndarray:
    """Logits of the traced program itself.

    A small model is compiled whole; a large one runs op by op, each weight read when it is used, then dropped.
    """
    size = sum(v.aval.size * v.aval.dtype.itemsize for v in program.jaxpr.invars[:-1])
    if size <= SMALL:
        return _whole(program, [jnp.asarray(weights.read(path)) for path in paths], tokens)
    run = _Run(program, tokens, paths, weights)
    for at in range(len(run.equations)):
        run.step(at)
    return run.result()


SMALL = 1 << 26
"""Bytes of weights up to which a model is held whole while it is checked."""


def _whole(closed: Any, arrays: Sequence[Array], tokens: Array) -> np.ndarray:
    casts = [x.astype(v.aval.dtype) for x, v in zip(arrays, closed.jaxpr.invars, strict=False)]
    (logits,) = jax.jit(jaxpr_as_fun(closed))(*casts, tokens)
    return np.asarray(logits, np.float32)


class _Run:
    """One traced program on its way through its equations. What only weights decide is made where it is used."""

    def __init__(self, closed: Any, tokens: Array, paths: Sequence[str], weights: Weights) -> None:
        self.jaxpr = closed.jaxpr
        self.equations = closed.jaxpr.eqns
        self.weights = weights
        self.params = dict(zip(self.jaxpr.invars[:-1], paths, strict=True))
        self.fixed: dict[Any, int] = {}  # results of equations on weights alone, by the equation that makes them
        self.values = dict(zip(self.jaxpr.constvars, closed.consts, strict=True)) | {self.jaxpr.invars[-1]: tokens}
        self.last = {v: at for at, e in enumerate(self.equations) for v in e.invars if not _literal(v)}

    def step(self, at: int) -> None:
        """Run one equation and drop what no later one reads."""
        equation = self.equations[at]
        read = [v for v in equation.invars if not _literal(v)]
        if read and all(v in self.params or v in self.fixed for v in read):
            self.fixed.update(dict.fromkeys(equation.outvars, at))
            return
        self.values.update(zip(equation.outvars, self._run(at), strict=True))
        for v in (*read, *equation.outvars):
            if self.last.get(v, -1) <= at and v not in self.jaxpr.outvars:
                self.values.pop(v, None)

    def _run(self, at: int) -> Sequence[Any]:
        equation = self.equations[at]
        out = _bind(equation, [self._value(v) for v in equation.invars])
        return out if equation.primitive.multiple_results else [out]

    def _value(self, v: Any) -> Any:
        if _literal(v):
            return v.val
        if v in self.params:
            return jnp.asarray(self.weights.read(self.params[v]), v.aval.dtype)
        if v in self.fixed:
            at = self.fixed[v]
            return self._run(at)[self.equations[at].outvars.index(v)]
        return self.values[v]

    def result(self) -> np.ndarray:
        """Logits [b,t,V]."""
        return np.asarray(self._value(self.jaxpr.outvars[0]), np.float32)


def _literal(v: Any) -> bool:
    return type(v).__name__ == "Literal"


def _bind(equation: Any, operands: Sequence[Any]) -> Any:
    """Run one equation, as a custom interpreter does; older jax returns the called functions apart."""
    found = equation.primitive.get_bind_params(equation.params)
    functions, settings = found if isinstance(found, tuple) else ((), found)
    return equation.primitive.bind(*functions, *operands, **settings)
