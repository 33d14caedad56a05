"""The fixtures of the pass tests here too, small models to optimize, and pipelines run on a model of six layers."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from effc import evaluate, healing
from effc.api import load
from effc.backend.to_python import emit, load_program
from effc.clock import Clock
from effc.frontend.source import Source
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.passes.context import Context
from effc.pipeline import Pipeline
from effc.report import PassReport
from effc.running import run_passes
from effc.runtime.engine import Engine
from effc.runtime.train.budget import Budget
from effc.runtime.weights import load_params
from effc.state import State
from effc.weights import Store, write_safetensors

PASSES = Path(__file__).parent.parent / "passes"

_FIXTURES = runpy.run_path(str(PASSES / "conftest.py"))

tiny, random_store, apply = (_FIXTURES[name] for name in ("tiny", "random_store", "apply"))


@pytest.fixture(autouse=True)
def keep_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of small models may stay in memory: compiling them anew is most of these tests' time."""
    for place in ("clock", "evaluate"):
        monkeypatch.setattr(f"effc.{place}.give_back", lambda: None)


@pytest.fixture(scope="session")
def source_of() -> Callable[[nn.Module, int], Source]:
    """A Flax module of tokens alone with random parameters, ready to optimize."""

    def make(module: nn.Module, context: int) -> Source:
        params = module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        return load(module, params, name="small", context=context)

    return make


@dataclass(frozen=True)
class Served:
    """What came of a pipeline: module, arrays, the program that serves them; phases as dumped; what passes said."""

    module: Module
    store: Store
    engine: Engine
    seen: list[str]
    reports: list[PassReport]


@pytest.fixture
def served(random_store: Callable[[Module], Store], tmp_path: Path) -> Callable[[str], Served]:
    """A pipeline on a decoder of six layers, trained for a few steps and emitted; every dump must read back."""

    def make(passes: str, heal: int = 4) -> Served:
        text = (PASSES / "tiny.effc").read_text().replace("context = 64", "context = 256")
        start, seen = parse(text.replace("2 * f32", "6 * f32").replace("times=2", "times=6")), list[str]()
        pipeline, origin = Pipeline.parse(passes), State(start, random_store(start))
        heldout = evaluate.random_windows(160, window=24, tokens=48, seed=0)
        context = Context("", start, origin.store, None, heldout, None, tmp_path / "work", window=16)
        asked = Budget(steps=heal) if healing.training(pipeline.passes) else None

        def watch(name: str, module: Module) -> None:
            assert parse(dump(module)) == module
            seen.append(name)

        final, reports = run_passes(origin, pipeline, context, asked, tmp_path / "spool", watch, Clock(None))
        program = load_program(emit(final.module))
        (file,) = write_safetensors(tmp_path / "w.safetensors", final.module, final.store)
        return Served(final.module, final.store, Engine(program, load_params(file, program.params)), seen, reports)

    return make
