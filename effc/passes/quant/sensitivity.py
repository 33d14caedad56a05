"""How much it hurts to code each parameter: measured once by the divergence of the model with it alone coded, kept.

Divergence grows with the square of the change of the weights, so what is measured at one coding tells of the
others by their rounding errors (each weighted by its input where that was seen).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from effc.ir.core import Module, Param
from effc.ir.types import Quant, Type
from effc.passes.quant.scaling import output_error
from effc.passes.quant.statistics import Statistics, cache_folder, model_hash
from effc.passes.quantizer import rounded
from effc.passes.weight_rules import coded, recoded
from effc.weights import Array, Store

if TYPE_CHECKING:
    from effc.divergence import Reference

SAMPLED = 2
"""Layers of a stack whose rounding errors speak for all."""

FLOOR = 1e-9
"""Nats a token: below it is the noise of f32."""


@dataclass(frozen=True)
class Sensitivity:
    """Nats a token that coding as `at` costs, of each parameter."""

    at: Mapping[str, Quant]
    harm: Mapping[str, float]


def sensitivity(
    module: Module, store: Store, at: Mapping[str, Quant], tokens: Sequence[Array], say: Callable[[str], None]
) -> Sensitivity:
    """Of the parameters in `at`, from the cache or measured into it."""
    key = hashlib.blake2b(digest_size=16)
    key.update(f"{model_hash(module, store)} {sorted((n, str(q)) for n, q in at.items())}".encode())
    for chunk in tokens:
        key.update(np.ascontiguousarray(chunk, np.int32).tobytes())
    file = cache_folder().with_name("sensitivity") / f"{key.hexdigest()}.json"
    if file.exists():
        say(f"sensitivity of {len(at)} parameters: reused")
        return Sensitivity(at, json.loads(file.read_text()))
    found = _measured(module, store, at, tokens)
    say(f"sensitivity of {len(at)} parameters: measured on {sum(c.size for c in tokens)} tokens")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(file)
    return Sensitivity(at, found)


def _measured(module: Module, store: Store, at: Mapping[str, Quant], tokens: Sequence[Array]) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="effc-"))
    try:
        from effc.divergence import Reference  # it evaluates, and evaluating lowers, which imports passes
        from effc.evaluate import Windows

        reference = Reference((module, store), Windows(tuple(tokens), 1), folder)
        return {name: max(FLOOR, _alone(module, store, name, quant, reference)) for name, quant in at.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alone(module: Module, store: Store, name: str, quant: Quant, reference: Reference) -> float:
    after = recoded(module, {name: quant})
    return reference.divergence((after, store.replace(coded(module, after, store, "mse"), after)))


def harms(
    module: Module, store: Store, known: Sensitivity, name: str, quants: Sequence[Quant], seen: Statistics
) -> list[float]:
    """Expected nats a token for each way to code a parameter."""
    param = module.params[name]
    layers = np.unique(np.linspace(0, param.count - 1, SAMPLED).astype(int))
    errors = {
        quant: sum(_error(store, param, quant, int(i), seen) for i in layers) for quant in (known.at[name], *quants)
    }
    unit = max(errors[known.at[name]], 1e-30)
    return [known.harm[name] * errors[quant] / unit for quant in quants]


def _error(store: Store, param: Param, quant: Quant, layer: int, seen: Statistics) -> float:
    w = np.asarray(store[param.name].read(layer)[""], np.float32)
    w = w if quant.axis == -2 else w.T
    wrong = rounded(w, replace(quant, axis=-2), "mse") - w
    if not seen.has(param.name) or len(w) > w.shape[1] * 64:
        return float(np.einsum("kn,kn->", wrong, wrong))
    return output_error(wrong, seen.of(param.name, layer).square)


def nbytes(param: Param, quant: Quant) -> int:
    """All layers, coded so."""
    return param.count * Type(quant, param.type.shape).nbytes()
