"""A Flax module that nobody has trained yet, with the arrays its own initialisers make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from effc.errors import EffcError
from effc.frontend import adapt
from effc.frontend.checkpoints.user_code import load_build
from effc.frontend.source import InMemory, Source, TokenizerFiles, flatten, unflatten


def fresh(
    ref: str, config: Mapping[str, Any], *, seed: int, context: int | None, tokenizer: TokenizerFiles | None
) -> Source:
    """What `FILE.py:FUNC` builds with this config, initialised; its code is run."""
    module = load_build(ref, Path())(**config)
    if isinstance(module, linen.Module):
        forward, arrays = adapt.from_linen(module, where=ref)[0], _linen(module, seed)
    elif isinstance(module, nnx.Module):
        forward, arrays = adapt.from_nnx(module, ref)[0], nnx.to_pure_dict(nnx.state(module, nnx.Param))
    else:
        raise EffcError(f"{ref}: returned {type(module).__name__}, want a flax.linen or flax.nnx Module")
    flat = {name: _float32(array) for name, array in flatten(arrays).items()}
    spec = adapt.as_spec(unflatten(flat))
    meta = {"format": "fresh", "vocab": adapt.vocab_of(forward, spec, ref)}
    return Source(Path(ref.partition(":")[0]).stem, forward, spec, InMemory(flat), tokenizer, context, meta)


def _linen(module: linen.Module, seed: int) -> Any:
    one, two = jax.random.split(jax.random.key(seed))
    keys: dict[str, jax.Array] = {"params": one, "dropout": two}
    return linen.meta.unbox(module.init(keys, jnp.zeros(adapt.PROBE, jnp.int32))["params"])


def _float32(array: Any) -> jax.Array:
    """Half floats widened: what is trained is f32."""
    return jnp.asarray(array, jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else array.dtype)
