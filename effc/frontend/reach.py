"""Which rows a region's rows need, found by changing one row after the other of random operands."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.ir.core import Func, Op, walk
from effc.ir.interpret import Context, evaluate_func, shape_of
from effc.ir.ops import ELEMENTWISE, OPS, Along
from effc.ir.types import NUMPY, Type

ROWS = 48
"""Rows that a region is tried on: a multiple of the sizes that programs cut lengths into."""

NEAR = ROWS // 4
"""Farthest look-back that is believed of so many rows."""

MOST = 1 << 24
"""Numbers in the operands of a region that is still tried out."""

EXACT = 1e-5

SHIFTS = frozenset({"lax.pad", "lax.slice", "lax.concatenate", "lax.conv_general_dilated"})
"""Ops that move rows by as much wherever they stand: what they reach is a fact of their shapes."""


@dataclass(frozen=True)
class Reach:
    """causal: no row needs a later one, as far as tried; alone: nor one of another sequence.

    back: how many rows before its own it needs, None for all.
    """

    causal: bool = True
    alone: bool = True
    back: int | None = None


def reach_of(body: Func, count: int, params: Mapping[str, Type]) -> Reach:
    """How far the rows of `body`'s results reach; its first `count` operands are rows [b,t,...]."""
    if any(op.kind in {"attention", "positions"} for op in walk(body)):
        return Reach()
    trial = _Trial(body, count, params)
    try:
        if trial.numbers() > MOST:
            return Reach()
        return trial.reach()
    except (TypeError, ValueError):  # sizes that are no whole numbers, or do not fit, at these lengths
        return Reach()


class _Trial:
    def __init__(self, body: Func, count: int, params: Mapping[str, Type]) -> None:
        self.body, self.count = body, count
        names = {name for op in walk(body) for name in op.params.values()}
        rng = np.random.default_rng(0)
        self.weights = {name: _random(rng, params[name], _sizes(1)) for name in sorted(names)}
        self.first, self.other = (self._operands(np.random.default_rng(seed)) for seed in (1, 2))

    def numbers(self) -> int:
        """In all operands."""
        return sum(x.size for x in [*self.first, *self.weights.values()])

    def _operands(self, rng: np.random.Generator) -> list[np.ndarray]:
        return [_random(rng, value.type, _sizes(ROWS)) for value in self.body.inputs]

    def reach(self) -> Reach:
        base = self._run(self.first)
        finite = all(np.isfinite(x).all() for x in base)
        half = ROWS // 2
        later = self._differs(base, self._run(self._changed(np.arange(ROWS) >= half)))
        causal, alone = not later[half - 1], self._alone(base)
        if not causal or not alone or not finite or not later.any():
            return Reach(causal, alone)
        return Reach(back=self._back(base))

    def _alone(self, base: Sequence[np.ndarray]) -> bool:
        """Whether the first sequence comes out the same beside another second one."""
        pairs = zip(self.first[: self.count], self.other[: self.count], strict=True)
        mixed = [np.concatenate([x[:1], y[1:]]) for x, y in pairs]
        out = self._run([*mixed, *self.first[self.count :]])
        return not self._differs([x[:1] for x in base], [x[:1] for x in out]).any()

    def _back(self, base: Sequence[np.ndarray]) -> int | None:
        """Rows before its own that every row needs, where that is few and the same for all."""
        needs = np.stack([self._differs(base, self._run(self._changed(np.arange(ROWS) == j))) for j in range(ROWS)], 1)
        back = _band(needs)
        if back is None or back > NEAR or not self._alike(base, back):
            return None
        if back == 0:
            return 0
        return back if self._shifts() and _band(needs | self._poisoned()) == back else None

    def _shifts(self) -> bool:
        """Whether rows meet only by ops that move them."""
        return all(op.kind in SHIFTS or _apart(op) for op in self.body.ops)

    def _poisoned(self) -> np.ndarray:
        """[row, row j] whether a NaN in row j comes through: what is multiplied by 0 does too."""
        bad = [np.full_like(x, np.nan) if x.dtype.kind == "f" else x for x in self.first]
        runs = [self._run(self._changed(np.arange(ROWS) == j, bad)) for j in range(ROWS)]
        return np.stack([np.any([_by_row(~np.isfinite(x)) for x in out], axis=0) for out in runs], 1)

    def _alike(self, base: Sequence[np.ndarray], back: int) -> bool:
        """Whether rows come out the same when those far before them are not there."""
        half = ROWS // 2
        late = [x[:, half:] if i < self.count else x for i, x in enumerate(self.first)]
        out = self._run(late, half)
        return not self._differs([x[:, half:] for x in base], out)[back:].any()

    def _changed(self, which: np.ndarray, to: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """The first operands with some rows taken from others."""
        out = list(self.first)
        for i in range(self.count):
            mask = which.reshape(1, -1, *(1,) * (out[i].ndim - 2))
            out[i] = np.where(mask, (to or self.other)[i], out[i])
        return out

    def _run(self, operands: Sequence[np.ndarray], rows: int = ROWS) -> list[np.ndarray]:
        out = self._compiled(rows)(list(operands), self.weights)
        return [np.asarray(x.astype(jnp.float32)) for x in out]

    @functools.lru_cache(maxsize=2)  # noqa: B019  a trial lives for one question
    def _compiled(self, rows: int) -> Any:
        def call(operands: list[Any], weights: dict[str, Any]) -> list[Any]:
            positions = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (2, rows))
            return evaluate_func(self.body, operands, weights, Context(_sizes(rows), positions))

        return jax.jit(call)

    def _differs(self, one: Sequence[np.ndarray], two: Sequence[np.ndarray]) -> np.ndarray:
        """For each row whether any result differs there; what is not finite is alike."""
        found = np.zeros(one[0].shape[1], bool)
        for x, y in zip(one, two, strict=True):
            x, y = np.nan_to_num(x, posinf=0, neginf=0), np.nan_to_num(y, posinf=0, neginf=0)
            span = max(1e-6, float(np.abs(x).max(initial=0.0)))
            found |= _by_row(np.abs(x - y) > EXACT * span)
        return found


def _by_row(found: np.ndarray) -> np.ndarray:
    return np.asarray(found.any(axis=(0, *range(2, found.ndim))))


def _band(needs: np.ndarray) -> int | None:
    """The greatest i - j where row i needs row j; None where one needs a later row. The first rows may differ."""
    row, other = np.nonzero(needs)
    if not len(row):
        return None
    back = int((row - other).max())
    late = row >= max(back, 0)
    return back if (other <= row)[late].all() else None


def _apart(op: Op) -> bool:
    moves = {"lax.reshape", "lax.transpose", "lax.broadcast_in_dim"}
    row = OPS.get(op.kind)
    return op.kind in ELEMENTWISE or op.kind in moves or (row is not None and row.along is Along.LOCAL)


def _sizes(rows: int) -> dict[str, int]:
    return {"b": 2, "t": rows}


def _random(rng: np.random.Generator, type: Type, sizes: Mapping[str, int]) -> np.ndarray:
    shape, dtype = shape_of(type, sizes), str(type.dtype)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype[0] in "iu":
        return rng.integers(0, 4, shape).astype(NUMPY[dtype])
    return rng.normal(size=shape).astype(np.float32).astype(jnp.dtype(NUMPY[dtype]))
