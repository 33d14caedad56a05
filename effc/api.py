"""What Python users call: a model from anywhere to a `Source`, and from there to an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from effc.driver import Settings
from effc.driver import optimize as run
from effc.errors import EffcError
from effc.frontend import adapt
from effc.frontend.checkpoints import open_checkpoint
from effc.frontend.source import PyTree, Source, Spec, TokenizerFiles, flatten
from effc.frontend.tokenizer import Tokenizer
from effc.report import Report

Forward = Callable[[PyTree, jax.Array], jax.Array]
Model = str | Path | linen.Module | nnx.Module | Forward


@dataclass(frozen=True)
class InMemory:
    """Arrays that somebody else keeps, by path."""

    arrays: Mapping[str, Any]

    def names(self) -> Iterable[str]:
        return self.arrays

    def spec(self, name: str) -> Spec:
        return Spec(np.shape(self.arrays[name]), self.arrays[name].dtype)

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self.arrays[name])


def load(
    model: Model,
    params: PyTree | None = None,
    *,
    name: str = "model",
    context: int | None = None,
    tokenizer: str | Path | None = None,
    module: str | None = None,
    dtype: str | None = None,
) -> Source:
    """From a checkpoint's path; from an NNX module; or, with params, from a Linen module or a function.

    The function is (params, tokens i32[B,T]) -> logits [B,T,V]. `context` is the most positions the model
    takes, `tokenizer` a tokenizer.json. `module` and `dtype` are for checkpoints, as on the command line.
    """
    if isinstance(model, str | Path):
        return open_checkpoint(model, module=module, dtype=dtype)
    forward, arrays = _forward(model, params, name)
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


def _forward(model: Any, params: PyTree | None, name: str) -> tuple[Forward, PyTree]:
    """A pure function and its parameters as nested dicts of arrays."""
    if isinstance(model, nnx.Module):
        forward, _ = adapt.from_nnx(model, name)
        return forward, nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if params is None:
        raise EffcError(f"{name}: no parameters, want load(model, params)")
    inner = params["params"] if set(params) == {"params"} else params
    plain = linen.meta.unbox(inner)
    if isinstance(model, linen.Module):
        return adapt.from_linen(model, adapt.as_spec(plain), name)[0], plain
    return model, plain


__all__ = ["InMemory", "load", "optimize"]
