"""Random stores for small modules given as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.ir.core import Module, Param
from effc.ir.parser import parse
from effc.ir.stream import run
from effc.runtime.engine import Engine


@dataclass(frozen=True)
class Fixed:
    """One parameter with arrays made up from a seed."""

    param: Param
    arrays: list[np.ndarray]

    def read(self, i: int) -> Mapping[str, np.ndarray]:
        return {"": self.arrays[i]}


def random_store(module: Module, seed: int = 0) -> dict[str, Fixed]:
    """f32 arrays, scaled so that activations stay near 1."""
    rng = np.random.default_rng(seed)

    def one(param: Param) -> np.ndarray:
        shape = tuple(size for size in param.type.shape if isinstance(size, int))
        return (rng.standard_normal(shape) * (shape[0] ** -0.5 if len(shape) > 1 else 1)).astype(np.float32)

    return {name: Fixed(p, [one(p) for _ in range(p.count)]) for name, p in module.params.items()}


@dataclass(frozen=True)
class Emitted:
    """A module as a program and as the interpreter runs it, on the same arrays."""

    module: Module
    source: str
    engine: Engine

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self.engine.forward(self.engine.params, jnp.asarray(tokens)))

    def interpreted(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(run(self.module, random_store(self.module), jnp.asarray(tokens)))

    def in_steps(self, tokens: np.ndarray, sizes: list[int]) -> np.ndarray:
        """Logits of the same tokens through the cache."""
        cache, out, start = self.engine.empty(len(tokens), 128), [], 0
        for size in sizes:
            logits, cache = self.engine.extend(jnp.asarray(tokens[:, start : start + size]), cache)
            out.append(np.asarray(logits))
            start += size
        return np.concatenate(out, axis=1)


@pytest.fixture
def emitted() -> Any:
    """Text of a module -> Emitted."""

    def make(text: str) -> Emitted:
        module = parse(text)
        source = emit(module)
        program, store = load_program(source), random_store(module)
        params: dict[str, Any] = {}
        for key, entry in program.params.items():
            if isinstance(entry, str):
                params[key] = jnp.asarray(store[key].arrays[0])
                continue
            stored = {k: text.partition(" = ")[2] or f"{key}.{k}" for k, text in entry.items()}
            count = max(len(store[name].arrays) for name in stored.values())
            params[key] = [{k: jnp.asarray(store[n].arrays[i]) for k, n in stored.items()} for i in range(count)]
        return Emitted(module, source, Engine(program, params))

    return make
