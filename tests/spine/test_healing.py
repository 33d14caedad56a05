"""Passes that train and calibrate, through the driver: when they run, what they are given, what is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from effc.artifact import Artifact, verify
from effc.driver import Settings, optimize, plan
from effc.errors import EffcError
from effc.frontend.source import Source
from effc.ir.core import Module
from effc.passes import PASSES, Exactness, Notes, Pass, PassError, Phase
from effc.passes.context import Context
from effc.runtime.train import Batch, Metrics, Plan, Tick, Tree, chosen, forward_kl, mean
from effc.weights import Array, Lazy, Store

QUIET = Settings(eval_tokens=64, window=32, speed=False)


class Small(nn.Module):
    """A linear between an embedding and a head."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(48, 32, name="embed")(tokens)
        return nn.Dense(48, use_bias=False, name="head")(x + nn.Dense(32, use_bias=False, name="up")(nn.silu(x)))


@dataclass(frozen=True)
class Forget(Pass):
    """Zeroes a matrix, then learns it again from the model as it was."""

    name: ClassVar[str] = "forget"
    later: ClassVar[list[str]] = []
    phase: ClassVar[Phase] = Phase.FOLD
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, module: Module, notes: Notes) -> Module:
        return replace(module, meta={**module.meta, "forgot": True})

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        def read(layer: int) -> dict[str, Array]:
            return {"": np.zeros_like(store["up.kernel"].read(layer)[""])}

        return [Lazy(store["up.kernel"].param, read)]

    def training_minutes(self) -> float:
        return 0.5

    def train(self, module: Module, store: Store, context: Context) -> Store:
        model, teacher = context.model(module, store), context.teacher
        self.later[:] = [one.name for one in context.later]

        def loss(tree: Tree, batch: Batch, tick: Tick) -> tuple[jax.Array, Metrics]:
            ids = batch["tokens"][:, :-1]
            sides = [m.program.forward(tree[k], ids) for k, m in (("teacher", teacher), ("student", model))]
            return mean(forward_kl(sides[0], sides[1]), batch["mask"]), {"count": batch["mask"].sum()}

        tree = {"student": model.params, "teacher": teacher.params}
        mask = {"student": chosen(model.program.params, "up.*"), "teacher": False}
        look = context.looks(model.program)
        fitted = context.fit(
            loss, tree, context.batches(8), Plan(context.budget, lr=0.03, warmup=2, looks=1),
            trainable=mask, evaluate=lambda tree: look(tree["student"]),
        )  # fmt: skip
        return model.store(fitted.params["student"], store)

    def calibrates(self) -> bool:
        return True

    def calibrate(self, module: Module, store: Store, context: Context, notes: Notes) -> Module:
        greatest = float(np.max(np.abs(Model(module, store, context))))
        notes.chose(f"greatest logit {greatest:.3f}")
        return replace(module, meta={**module.meta, "greatest": greatest})


def Model(module: Module, store: Store, context: Context) -> np.ndarray:
    """Logits of calibration prompts."""
    model = context.model(module, store)
    return np.asarray(model.program.forward(model.params, jnp.asarray(context.prompts(2, 8))))


@dataclass(frozen=True)
class Cheat(Forget):
    """Changes parameters where it may only measure."""

    name: ClassVar[str] = "cheat"

    def training_minutes(self) -> float:
        return 0.0

    def calibrate(self, module: Module, store: Store, context: Context, notes: Notes) -> Module:
        return replace(module, params={k: replace(p, path="mine") for k, p in module.params.items()})


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "forget", Forget)
    monkeypatch.setitem(PASSES, "cheat", Cheat)


@pytest.fixture(scope="module")
def source(source_of) -> Source:
    return source_of(Small(), 32)


def test_a_pass_that_trains_and_calibrates(source: Source, tmp_path: Path) -> None:
    asked = replace(QUIET, passes="quant8,forget", heal="30", dump=tmp_path / "dump")
    report = optimize(source, tmp_path / "out", asked)
    order = [file.name[3:-5] for file in sorted((tmp_path / "dump").iterdir())]
    assert order == ["input", "forget", "heal", "quant8", "calibrate"]
    assert Forget.later == ["quant8"]
    assert verify(tmp_path / "out") == []
    found = Artifact.load(tmp_path / "out")
    assert float(found.module.meta["greatest"]) > 0
    (run,) = found.report()["passes"][0]["trained"]
    looks = [look["values"]["kl"] for look in run["looks"]]
    assert run["steps"] == 30
    assert len(looks) == 3 and looks[-1] < 0.3 * looks[0]
    assert report.after.quality is not None and report.after.quality.kl < 0.5 * looks[0]
    assert any("forget 30" in note for note in report.notes)
    assert any("greatest logit" in choice for choice in report.passes[0].choices)
    assert any(line.startswith("forget trained 30 steps") for line in report.footnotes())
    assert not list(tmp_path.glob(".out*"))  # the work folder went with its use


@pytest.mark.slow
def test_an_interrupted_run_goes_on(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(QUIET, passes="forget", heal="12")
    whole = optimize(source, tmp_path / "whole", asked)
    monkeypatch.setattr("effc.passes.context._bar", _kill_at(7))
    with pytest.raises(KeyboardInterrupt):
        optimize(source, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    passes_again(monkeypatch)
    again = optimize(source, tmp_path / "out", asked)
    (run,) = again.passes[0].trained
    assert run["resumed"] == 7
    assert again.after.quality == whole.after.quality


def passes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "forget", Forget)


def _kill_at(step: int):
    import contextlib
    import signal

    @contextlib.contextmanager
    def bar(console: object, title: str):
        yield lambda row: signal.raise_signal(signal.SIGINT) if row.step == step else None

    return bar


def test_no_budget_is_no_training(source: Source, tmp_path: Path) -> None:
    report = optimize(source, tmp_path / "out", replace(QUIET, passes="forget", heal="0"))
    assert report.passes[0].trained == ()


def test_calibration_may_not_touch_parameters(source: Source, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="changed parameters while it calibrated"):
        optimize(source, tmp_path / "out", replace(QUIET, passes="cheat"))


def test_a_plan_tells_what_trains_and_when(source: Source) -> None:
    told = json.dumps(plan(source, replace(QUIET, passes="quant8,forget", heal="90s")).json())
    assert "forget 1.5m" in told and "calibrate: measured last" in told


@pytest.mark.parametrize(("heal", "message"), [("10m", "no pass of 'quant8' trains"), ("soon", "want steps")])
def test_budgets_refused(source: Source, tmp_path: Path, heal: str, message: str) -> None:
    with pytest.raises(EffcError, match=message):
        optimize(source, tmp_path / "out", replace(QUIET, passes="quant8", heal=heal))
