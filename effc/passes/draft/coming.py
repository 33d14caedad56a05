"""Weights as later passes will code them: a drafter learns with the weights that will be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from effc.ir.core import Module
from effc.ir.types import Quant
from effc.passes.base import Notes, Pass, Phase
from effc.passes.draft.parts import PREFIX
from effc.passes.quantizer import quantize
from effc.runtime.program import Program
from effc.runtime.qarray import spread_groups
from effc.runtime.train.fake import Form, codes
from effc.runtime.train.plan import Tree
from effc.runtime.train.tree import by_name, places

if TYPE_CHECKING:
    from effc.passes.context import Model


@dataclass(frozen=True)
class Rounding:
    """How one matrix will be coded, and the scales f32, one a group, that it would have now."""

    quant: Quant
    scales: np.ndarray

    def __call__(self, w: jax.Array) -> jax.Array:
        """What the nearest codes stand for; gradients pass, and stop where codes end (straight-through)."""
        quant = self.quant
        scale = spread_groups(jnp.asarray(self.scales), group=quant.group, axis=quant.axis, extent=w.shape[quant.axis])
        form = Form(quant.bits, quant.group, quant.axis, quant.scale)
        return codes(form, {"steps": w / scale}) * scale


def quants(module: Module, later: Sequence[Pass]) -> dict[str, Quant]:
    """What the quantizers among `later` passes will make of the drafter's own matrices, by name.

    Whole numbers without zero points alone; other forms are not foreseen, and learn as floats.
    """
    for one in later:
        module = one.run(module, Notes()) if one.phase == Phase.QUANTIZE else module
    mine = {name: param.type.dtype for name, param in module.params.items() if name.startswith(f"{PREFIX}.")}
    return {name: q for name, q in mine.items() if isinstance(q, Quant) and q.form == "int" and q.sym}


def roundings(model: Model, params: Tree, later: Sequence[Pass]) -> dict[str, Rounding]:
    """Of these parameters, each a single matrix."""
    arrays, out = by_name(model.program.params, params), dict[str, Rounding]()
    for name, quant in quants(model.module, later).items():
        (array,) = arrays[name]
        out[name] = Rounding(quant, quantize(np.asarray(array), quant, "mse", name)["scales"].astype(np.float32))
    return out


def rounded(how: Mapping[str, Rounding], program: Program, params: Tree) -> Tree:
    """The parameters with these matrices rounded."""
    return jax.tree.map(lambda at, x: how[at.name](x) if at.name in how else x, places(program.params), params)
