"""Codes that learn: arrays of the same types as a quantizer makes, nearer to the input model."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from effc.evaluate import Windows, compare
from effc.ir.core import Module
from effc.passes import PassError, Qat, Quant4, runner
from effc.passes.base import Notes
from effc.passes.context import Context, Model
from effc.pipeline import Pipeline
from effc.runtime.train.budget import Budget
from effc.weights import nbytes

TOKENS = np.random.default_rng(0).integers(0, 160, (4, 25)).astype(np.int32)


@pytest.fixture
def context(tiny: Module, random_store, tmp_path: Path, monkeypatch) -> Context:
    """Trains on four sequences."""
    batch = {"tokens": TOKENS, "mask": np.ones((4, 24), bool)}
    monkeypatch.setattr(Context, "batches", lambda self, rows, length=None: lambda step, params: batch)
    budget = Budget(steps=40)
    return Context("qat", tiny, random_store(tiny), None, Windows((TOKENS,), 1), None, tmp_path, budget)


def test_training_brings_codes_nearer(tiny, random_store, context: Context) -> None:
    store, made_by = random_store(tiny), Qat(method="mse", lr=0.02)
    step = runner.step(made_by, tiny)
    assert nbytes(step.after) == nbytes(runner.step(Quant4(), tiny).after)
    plain = Quant4().weights(tiny, step.after, store)
    trained = made_by.arrays(tiny, step.after, store, context, Notes())
    kl = [compare((tiny, store), (step.after, one), context.heldout)[1].kl or 0 for one in (plain, trained)]
    assert kl[1] < 0.8 * kl[0]
    assert context.runs["qat"][0].steps == 40
    model = Model.of(step.after, trained)
    assert bool(jnp.isfinite(model.program.forward(model.params, jnp.asarray(TOKENS))).all())
    for name, param in step.after.params.items():
        one, other = plain[name].read(0), trained[name].read(0)
        assert {k: (v.dtype, v.shape) for k, v in one.items()} == {k: (v.dtype, v.shape) for k, v in other.items()}
        assert trained[name].param == param


def test_no_budget_is_the_quantizer_alone(tiny, random_store, context: Context) -> None:
    made_by, store = Qat(method="mse"), random_store(tiny)
    step = runner.step(made_by, tiny)
    none = Context("qat", tiny, store, None, context.heldout, None, context.folder)
    arrays = made_by.arrays(tiny, step.after, store, none, Notes())
    plain = Quant4().weights(tiny, step.after, store)
    for name in step.after.params:
        np.testing.assert_array_equal(arrays[name].read(0).get("codes", 0), plain[name].read(0).get("codes", 0))


def test_options_are_checked(tiny) -> None:
    for text in ("qat{lr=0}", "qat{rows=0}", "qat{minutes=-1}"):
        with pytest.raises(PassError, match="more than nothing"):
            runner.run(tiny, Pipeline.parse(text).ordered())
