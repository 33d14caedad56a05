"""Parameters of an emitted program as shapes alone, as they are made ready for TPUs when they are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effc.runtime.forms import BITS, row_bytes
from effc.runtime.kernels.matmul import tpu
from effc.runtime.primitives import dtype_of
from effc.runtime.program import Table
from effc.runtime.qarray import QArray
from effc.runtime.weights import Spec, parse_spec


def abstract_params(table: Table) -> dict[str, Any]:
    """The tree that `extend` takes, ShapeDtypeStructs for arrays; no weights are needed."""
    return {key: _entry(key, entry) for key, entry in table.items()}


def _entry(key: str, entry: str | Mapping[str, str]) -> Any:
    if isinstance(entry, str):
        return _array(parse_spec(key, entry))
    specs = {name: parse_spec(f"{key}.{name}", text) for name, text in entry.items()}
    layers = max(spec.stack for spec in specs.values())
    return [{name: _array(spec) for name, spec in specs.items() if i < spec.stack} for i in range(layers)]


def _array(spec: Spec) -> jax.ShapeDtypeStruct | QArray:
    if spec.quant is None:
        return jax.ShapeDtypeStruct(spec.shape, dtype_of(spec.dtype))
    form = spec.dtype if spec.dtype in BITS else "int"
    bits, group = BITS.get(form) or int(spec.dtype[1:]), int(spec.quant.get("group", 0))
    axis = int(spec.quant.get("axis", -2))
    grouped = list(spec.shape)
    grouped[axis] = math.ceil(spec.shape[axis] / (group or spec.shape[axis]))
    scales = jax.ShapeDtypeStruct(tuple(grouped), dtype_of(spec.quant.get("scale", "f32")))
    codes = jax.ShapeDtypeStruct(spec.shape, jnp.int8)
    if bits <= 4:
        codes = jax.ShapeDtypeStruct((*spec.shape[:-1], row_bytes(spec.shape[-1], 4)), jnp.uint8)
    zeros = None if "sym" in spec.quant else scales
    # A tree of shapes: the class does not look at what it holds.
    stored = QArray(codes, scales, zeros, bits, group, axis, spec.shape[-1], form)  # type: ignore[arg-type]
    return jax.eval_shape(tpu.prepared, stored)
