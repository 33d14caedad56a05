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
from typing import TYPE_CHECKING, Any

import numpy as np

from effc.ir.core import Module, Param
from effc.ir.types import Quant, Type
from effc.passes.quant.gptq import gptq
from effc.passes.quant.scaling import output_error
from effc.passes.quant.statistics import Statistics, cache_folder, model_hash
from effc.passes.quantizer import rounded, spread
from effc.passes.weight_rules import coded, recoded
from effc.weights import Array, Arrays, Lazy, Store

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
    layers: Mapping[str, Sequence[float]]
    """Of each layer of a block, all that is coded in it together."""

    def of_span(self, name: str, block: str, span: range) -> float:
        """Of some layers of a parameter, by their part in what all layers cost."""
        return self.harm[name] * sum(self.layers[block][i] for i in span) / sum(self.layers[block])


def sensitivity(
    module: Module, store: Store, at: Mapping[str, Quant], blocks: Mapping[str, Sequence[str]], tokens: Sequence[Array],
    say: Callable[[str], None],
) -> Sensitivity:  # fmt: skip
    """Of the parameters in `at` and of the layers of `blocks`, from the cache or measured into it."""
    key = hashlib.blake2b(digest_size=16)
    key.update(f"{model_hash(module, store)} {sorted((n, str(q)) for n, q in at.items())} {dict(blocks)}".encode())
    for chunk in tokens:
        key.update(np.ascontiguousarray(chunk, np.int32).tobytes())
    file = cache_folder().with_name("sensitivity") / f"{key.hexdigest()}.json"
    what = f"sensitivity of {len(at)} parameters and of each layer"
    if file.exists():
        say(f"{what}: reused")
        return Sensitivity(at, **json.loads(file.read_text()))
    found = _measured(module, store, at, blocks, tokens)
    say(f"{what}: measured on {sum(c.size for c in tokens)} tokens")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(file)
    return Sensitivity(at, **found)


def _measured(
    module: Module, store: Store, at: Mapping[str, Quant], blocks: Mapping[str, Sequence[str]], tokens: Sequence[Array]
) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="effc-"))
    try:
        from effc.divergence import Reference  # it evaluates, and evaluating lowers, which imports passes
        from effc.evaluate import Windows

        reference = Reference((module, store), Windows(tuple(tokens), 1), folder)
        harm = {name: max(FLOOR, _alone(module, store, name, quant, reference)) for name, quant in at.items()}
        return {
            "harm": harm,
            "layers": {name: _layers(module, store, at, own, reference) for name, own in blocks.items()},
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _layers(
    module: Module, store: Store, at: Mapping[str, Quant], names: Sequence[str], reference: Reference
) -> list[float]:
    """With what `at` says of one layer of a block, the others as they are."""
    count = module.params[names[0]].stack
    out: list[float] = []
    for layer in range(count):
        made = [Lazy(module.params[name], _only(store[name], at[name], layer)) for name in names]
        out.append(max(FLOOR, reference.divergence((module, store.replace(made, module)))))
    return out


def _only(lazy: Lazy, quant: Quant, layer: int) -> Callable[[int], Arrays]:
    """Arrays of a parameter, that of one layer rounded."""

    def read(i: int) -> Arrays:
        arrays = lazy.read(i)
        if i != layer:
            return arrays
        upright = quant.axis == -2
        w = np.asarray(arrays[""] if upright else arrays[""].T, np.float32)
        near = rounded(w, replace(quant, axis=-2), "mse")
        return {"": (near if upright else near.T).astype(arrays[""].dtype)}

    return read


def _alone(module: Module, store: Store, name: str, quant: Quant, reference: Reference) -> float:
    after = recoded(module, {name: quant})
    return reference.divergence((after, store.replace(coded(module, after, store, "mse"), after)))


def harms(
    store: Store, param: Param, quants: Sequence[Quant], measured: tuple[Quant, float], seen: Statistics, fits: bool
) -> list[float]:
    """Expected nats a token for each way to code a parameter, from what rounding it one way was measured to cost."""
    layers = np.unique(np.linspace(0, param.count - 1, SAMPLED).astype(int))
    at, harm = measured
    errors = {q: sum(_error(store, param, q, int(i), seen) for i in layers) for q in {at, *quants}}
    gain = _gain(store, param, at, int(layers[-1]), seen) if fits else 1.0
    return [harm * gain * errors[quant] / max(errors[at], 1e-30) for quant in quants]


def _gain(store: Store, param: Param, quant: Quant, layer: int, seen: Statistics) -> float:
    """What GPTQ leaves of the error of rounding."""
    if not seen.has(param.name):
        return 1.0
    w, square = _upright(store, param, quant, layer), seen.of(param.name, layer).square
    left = output_error(spread(*gptq(w, square, replace(quant, axis=-2), "mse"), quant.group) - w, square)
    return min(1.0, left / max(_error(store, param, quant, layer, seen), 1e-30))


def _upright(store: Store, param: Param, quant: Quant, layer: int) -> Array:
    """w[K,N], f32."""
    w = np.asarray(store[param.name].read(layer)[""], np.float32)
    return w if quant.axis == -2 else w.T


def _error(store: Store, param: Param, quant: Quant, layer: int, seen: Statistics) -> float:
    w = _upright(store, param, quant, layer)
    wrong = rounded(w, replace(quant, axis=-2), "mse") - w
    if not seen.has(param.name):
        return float(np.einsum("kn,kn->", wrong, wrong))
    return output_error(wrong, seen.of(param.name, layer).square)


def nbytes(param: Param, quant: Quant) -> int:
    """All layers, coded so."""
    return param.count * Type(quant, param.type.shape).nbytes()
