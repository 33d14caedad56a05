"""A small Llama-like program with random weights, emitted from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.ir.parser import parse
from effc.runtime.engine import Engine
from effc.runtime.program import Program
from effc.runtime.weights import parse_spec

TINY = Path(__file__).parent / "tiny.effc"


def random_params(program: Program, seed: int = 0) -> dict[str, Any]:
    """f32 arrays for a program's dense parameters, scaled so that activations stay near 1."""
    rng = np.random.default_rng(seed)

    def arrays(key: str, text: str) -> list[jax.Array]:
        spec = parse_spec(key, text)
        count, scale = spec.stack or 1, spec.shape[0] ** -0.5 if len(spec.shape) > 1 else 1.0
        return [jnp.asarray(rng.standard_normal(spec.shape, np.float32) * scale) for _ in range(count)]

    out: dict[str, Any] = {}
    for key, entry in program.params.items():
        if isinstance(entry, str):
            out[key] = arrays(key, entry)[0]
            continue
        columns = {k: arrays(k, text) for k, text in entry.items()}
        out[key] = [dict(zip(columns, layer)) for layer in zip(*columns.values())]
    return out


@pytest.fixture(scope="session")
def program() -> Program:
    return load_program(emit(parse(TINY.read_text())))


@pytest.fixture(scope="session")
def params(program: Program) -> dict[str, Any]:
    return random_params(program)


@pytest.fixture(scope="session")
def engine(program: Program, params: dict[str, Any]) -> Engine:
    return Engine(program, params)
