"""Fake quantization: matrices kept as floats in steps of their codes; losses see what the nearest codes stand for.

A coded matrix becomes a dict: `steps` f32 of its shape, the codes with a fraction; `stretch`, how far each scale
has moved; `scale` and perhaps `zero` as they were. Codes are steps rounded and cut to their range, gradients
go through the rounding as if it were not there, and stop at what is cut (straight-through).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from effc.runtime.qarray import QArray, spread_groups
from effc.runtime.rounding import through
from effc.runtime.train.plan import Tree

GAIN = 0.1
"""A step of training moves a scale by this much less than a code: their ratio is what Adam cannot know."""


@dataclass(frozen=True)
class Form:
    """How the codes of a leaf are grouped, and the dtype that its scales are stored in."""

    bits: int
    group: int
    axis: int
    scale: Any

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest code."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1


@dataclass(frozen=True)
class Dense:
    """A leaf that is not coded."""


def forms(params: Tree) -> Tree:
    """A `Form` for every coded leaf of a program's parameters, `Dense` for the others."""
    return jax.tree.map(_form, params, is_leaf=_coded)


def _form(leaf: Any) -> Form | Dense:
    return Form(leaf.bits, leaf.group, leaf.axis, leaf.scales.dtype) if _coded(leaf) else Dense()


def _coded(leaf: Any) -> bool:
    return isinstance(leaf, QArray)


def loose(params: Tree) -> Tree:
    """The parameters, every coded leaf as steps, stretch, scale and zero; each begins where its code is."""
    return jax.tree.map(lambda leaf: _loose(leaf) if _coded(leaf) else leaf, params, is_leaf=_coded)


def _loose(q: QArray) -> dict[str, jax.Array]:
    scale = q.scales.astype(jnp.float32)
    parts = {"steps": q.unpacked().astype(jnp.float32), "stretch": jnp.zeros_like(scale), "scale": scale}
    return parts if q.zeros is None else {**parts, "zero": q.zeros.astype(jnp.float32)}


def trainable(told: Tree, dense: bool = True) -> Tree:
    """A mask of `loose` parameters: steps and stretches, and where `dense` the leaves that are not coded."""
    coded = {"scale": False, "steps": True, "stretch": True, "zero": False}
    return jax.tree.map(lambda form: dense if isinstance(form, Dense) else coded, told)


def codes(form: Form, parts: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
    """f32 whole numbers in range; with a key steps are rounded up as often as they are near to the next."""
    steps = parts["steps"]
    noise = 0.0 if key is None else jax.random.uniform(key, steps.shape, minval=-0.5, maxval=0.5)
    low, high = form.limits
    return through(jnp.clip(jnp.round(steps + noise), low, high), jnp.clip(steps, low - 0.5, high + 0.5))


def scales(form: Form, parts: Mapping[str, jax.Array]) -> jax.Array:
    """f32, rounded as they will be stored."""
    moved = parts["scale"] * jnp.exp(GAIN * parts["stretch"])
    return through(moved.astype(form.scale).astype(jnp.float32), moved)


def faked(told: Tree, params: Tree, key: jax.Array | None = None) -> Tree:
    """Dense parameters as the codes of `loose` ones have them; with a key rounding is stochastic."""
    count = itertools.count()

    def one(form: Form | Dense, leaf: Any) -> Any:
        number = next(count)
        if isinstance(form, Dense):
            return leaf
        return _dense(form, leaf, None if key is None else jax.random.fold_in(key, number))

    return jax.tree.map(one, told, params)


def _dense(form: Form, parts: Mapping[str, jax.Array], key: jax.Array | None) -> jax.Array:
    def spread(values: jax.Array) -> jax.Array:
        return spread_groups(values, group=form.group, axis=form.axis, extent=parts["steps"].shape[form.axis])

    near = codes(form, parts, key)
    near = near - spread(parts["zero"]) if "zero" in parts else near
    return near * spread(scales(form, parts))
