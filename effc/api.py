"""What Python users call: a model from anywhere to a `Source`, and from there to an artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen, nnx

from effc import distilling
from effc.distilling import Distilled
from effc.driver import Settings
from effc.driver import optimize as run
from effc.errors import EffcError
from effc.frontend import adapt
from effc.frontend.checkpoints import open_checkpoint
from effc.frontend.source import InMemory, PyTree, Source, TokenizerFiles, flatten
from effc.frontend.tokenizer import Tokenizer
from effc.opened import Opened, of_source, open_model
from effc.report import Report

Forward = Callable[[PyTree, jax.Array], jax.Array]
Model = str | Path | linen.Module | nnx.Module | Forward


def load(
    model: Model,
    params: PyTree | None = None,
    *,
    name: str = "model",
    context: int | None = None,
    tokenizer: str | Path | None = None,
    module: str | None = None,
    dtype: str | None = None,
    inputs: adapt.Inputs = "",
) -> Source:
    """From a checkpoint's path; from an NNX module; or, with params, from a Linen module or a function.

    The function is (params, tokens i32[B,T]) -> logits [B,T,V]. `context` is the most positions the model
    takes, `tokenizer` a tokenizer.json. `module` and `dtype` are for checkpoints, as on the command line.
    `inputs` says what arguments of a module are given: "ids=tokens,mask=causal", or by argument a role or a
    function of the tokens (roles: effc.frontend.adapt.ROLES).
    """
    if isinstance(model, str | Path):
        module = f"{module or ''}({_spelled(inputs)})" if inputs else module
        return open_checkpoint(model, module=module, dtype=dtype)
    forward, arrays = _forward(model, params, name, inputs)
    spec = adapt.as_spec(arrays)
    vocab = adapt.vocab_of(forward, spec, name)
    files = TokenizerFiles(Path(tokenizer).read_bytes()) if tokenizer else None
    if files:
        Tokenizer(files, str(tokenizer)).check_fits(vocab)
    meta = {"format": "memory", "vocab": vocab}
    return Source(name, forward, spec, InMemory(flatten(arrays)), files, context, meta)


def optimize(model: Source | Model, out: str | Path, passes: str = "", **options: Any) -> Report:
    """Writes an artifact to `out`; `options` are the fields of `effc.Settings`."""
    source = model if isinstance(model, Source) else load(model)
    return run(source, Path(out), Settings(passes=passes, **options))


def distill(
    teacher: str | Path | Opened | Source,
    out: str | Path,
    student: str | Path | Opened | Source | None = None,
    *,
    layers: str | int | Sequence[int] | None = None,
    **options: Any,
) -> Distilled:
    """Trains a smaller `student`, or some `layers` of the teacher, on what the teacher says; an artifact at `out`.

    `options` are the fields of `effc.distilling.Distillation`; `budget` may be text (`500` steps, `10m`), the fields
    of its objective (kind, alpha, temperature, beta) may be given beside them.
    """
    if (student is None) == (layers is None):
        raise EffcError("distill: want a student, or layers of the teacher, one of them")
    big = _opened(teacher)
    small = distilling.of_layers(big, _listed(layers)) if student is None else _opened(student)
    return distilling.distill(small, big, Path(out), distilling.asked(**options))


def _listed(layers: str | int | Sequence[int] | None) -> str:
    """Layers as the command line spells them."""
    return str(layers) if isinstance(layers, str | int) else ",".join(map(str, layers or ())) + ","


def _opened(model: str | Path | Opened | Source) -> Opened:
    if isinstance(model, Opened):
        return model
    return of_source(model) if isinstance(model, Source) else open_model(Path(model))


def _spelled(inputs: adapt.Inputs) -> str:
    """Inputs as on the command line; a function has no spelling there."""
    if isinstance(inputs, str):
        return inputs
    unnamed = [name for name, role in inputs.items() if not isinstance(role, str)]
    if unnamed:
        raise EffcError(f"inputs {unnamed[0]}: a function, want a role for a checkpoint: {', '.join(adapt.ROLES)}")
    return ",".join(f"{name}={role}" for name, role in inputs.items())


def _forward(model: Any, params: PyTree | None, name: str, inputs: adapt.Inputs) -> tuple[Forward, PyTree]:
    """A pure function and its parameters as nested dicts of arrays."""
    if isinstance(model, nnx.Module):
        forward, _ = adapt.from_nnx(model, name, inputs)
        return forward, nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if params is None:
        raise EffcError(f"{name}: no parameters, want load(model, params)")
    inner = params["params"] if set(params) == {"params"} else params
    plain = linen.meta.unbox(inner)
    if isinstance(model, linen.Module):
        return adapt.from_linen(model, adapt.as_spec(plain), name, inputs)[0], plain
    if inputs:
        raise EffcError(f"{name}: inputs are for modules, want none for a function of (params, tokens)")
    return model, plain


__all__ = ["InMemory", "distill", "load", "optimize"]
