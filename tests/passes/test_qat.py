"""Codes that learn: arrays of the same types as a quantizer makes, nearer to the input model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.evaluate import Windows, compare
from effc.ir.core import Module
from effc.passes import Mixed, PassError, Qat, Quant4, runner
from effc.passes.base import Notes
from effc.passes.context import Context, Model
from effc.passes.qat import observed
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


@pytest.mark.slow
def test_it_begins_with_the_bits_that_mixed_gives(tiny, random_store, context: Context, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(context.folder))
    monkeypatch.setattr(Context, "prompts", lambda self, count, length: TOKENS[:2])
    store = random_store(tiny)
    mixed = Mixed(bits=5.0, tokens=64).decided(tiny, store, context)
    made_by = Qat(spend=5.0, lr=0.02, tokens=64, method="gptq").decided(tiny, store, context)
    assert (made_by.rules, made_by.cut) == (mixed.rules, mixed.cut)
    steps = [runner.step(one, tiny) for one in (mixed, made_by)]
    assert steps[0].after == steps[1].after
    stores = [
        one.arrays(tiny, step.after, store, context, Notes()) for one, step in zip((mixed, made_by), steps, strict=True)
    ]
    kl = [compare((tiny, store), (steps[0].after, one), context.heldout)[1].kl or 0 for one in stores]
    assert kl[1] < kl[0]


@pytest.mark.slow
def test_activations_and_gradients_may_be_rounded_while_training(tiny, random_store, context: Context) -> None:
    store = random_store(tiny)
    runs = []
    for act, backward in ((0, 0), (4, 0), (4, 8)):
        made_by = Qat(method="mse", lr=0.02, act=act, backward=backward)
        step = runner.step(made_by, tiny)
        assert not any(op.kind == "fake_quant" for func in step.after.funcs.values() for op in func.ops)
        runs.append((step.after, made_by.arrays(tiny, step.after, store, context, Notes())))
    served = [observed(module, 4, 0) for module, _ in runs]
    kl = [
        compare((tiny, store), (m, one), context.heldout)[1].kl or 0 for m, (_, one) in zip(served, runs, strict=True)
    ]
    assert kl[1] < kl[0] and kl[2] < kl[0]  # who is trained with rounded activations stands them better
    norms = [one["norm"].read(0)[""] for _, one in runs]
    assert not np.array_equal(norms[1], norms[2])


def test_rounding_gradients_leaves_what_is_computed(tiny, random_store) -> None:
    plain, rounds = Model.of(tiny, random_store(tiny)), Model.of(observed(tiny, 0, 4), random_store(tiny))
    ids = jnp.asarray(TOKENS)

    def loss(model: Model) -> jax.Array:
        return jax.grad(lambda params: jnp.mean(jnp.square(model.program.forward(params, ids))))(model.params)

    here, there = (model.program.forward(model.params, ids) for model in (plain, rounds))
    np.testing.assert_array_equal(here, there)
    pairs = list(zip(*(jax.tree.leaves(loss(model)) for model in (plain, rounds)), strict=True))
    off = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in pairs]
    assert 0.01 < np.mean(off) < 0.5


def test_options_are_checked(tiny) -> None:
    for text in ("qat{act=1}", "qat{backward=9}"):
        with pytest.raises(PassError, match="want 0 or 2 to 8"):
            runner.run(tiny, Pipeline.parse(text).ordered())
    for text in ("qat{lr=0}", "qat{rows=0}", "qat{minutes=-1}"):
        with pytest.raises(PassError, match="more than nothing"):
            runner.run(tiny, Pipeline.parse(text).ordered())
