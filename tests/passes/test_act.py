"""Activations in codes: where, how large the error is, static scales, gradients."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.stream import run
from effc.passes import PassError, runner
from effc.passes.base import Notes
from effc.passes.context import Model
from effc.pipeline import Pipeline
from effc.runtime.kernels.region import native
from effc.runtime.layers import fake_quant

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 160, (1, 24)), jnp.int32)
X = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 16)), jnp.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_have_scales_of_their_own(bits: int) -> None:
    x = (X * jnp.logspace(-3, 3, 5)[None, :, None]).at[0, 0].set(0)
    steps = jnp.max(jnp.abs(x), -1, keepdims=True) / (2 ** (bits - 1) - 0.5)
    assert bool(jnp.all(jnp.abs(fake_quant(x, bits=bits) - x) <= 0.5001 * steps))
    assert bool(jnp.all(fake_quant(x, bits=bits)[0, 0] == 0))


def test_given_scales_cut() -> None:
    y = fake_quant(X, jnp.asarray([0.5]), bits=3)
    np.testing.assert_allclose(y, np.clip(np.round(X / 0.5), -3, 3) * 0.5)


def test_groups_have_scales_of_their_own() -> None:
    y = fake_quant(X, bits=8, group=6)  # of 16 places: 6, 6 and 4
    for part in (slice(0, 6), slice(6, 12), slice(12, 16)):
        np.testing.assert_allclose(y[..., part], fake_quant(X[..., part], bits=8), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "want"), [("act8{group=-1}", "0 or more"), ("act8{group=32,scale=static}", "of scale")]
)
def test_groups_that_cannot_be(tiny, text: str, want: str) -> None:
    with pytest.raises(PassError, match=want):
        runner.run(tiny, Pipeline.parse(text).ordered())


def test_rounded_groups_run_in_native_products(tiny, random_store) -> None:
    """One byte a number, of a scale each: the reference's codes, so what is left is how sums are added up."""
    models, modules, store = list[Model](), [tiny], random_store(tiny)
    for step in runner.run(tiny, Pipeline.parse("quant4{group=16},act8{group=16}").ordered()):
        store = step.made_by.weights(step.before, step.after, store)
        modules.append(step.after)
        models.append(Model.of(step.after, store))
    after = run(modules[-1], store, TOKENS)
    calls = [(jax.jit(native.regions(one.program.forward)), native.packed(one.params)) for one in models]
    counts = [call.lower(params, TOKENS).as_text().count("custom_call @effc_region") for call, params in calls]
    assert counts[0] == counts[1] > 0
    other, got = (call(params, TOKENS) for call, params in calls)
    np.testing.assert_allclose(got, after, atol=2e-3 * float(jnp.abs(after).max()))
    assert float(jnp.abs(other - after).max()) > 4e-3 * float(jnp.abs(after).max())  # it is the rounding that is there


def test_gradients_pass_through() -> None:
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(fake_quant(x, bits=8)))(X), jnp.ones_like(X))


def test_gradients_are_rounded_without_moving_their_mean() -> None:
    wanted = jnp.tile(X[:1, :1], (4000, 1, 1))
    found = jax.vjp(lambda x: fake_quant(x, bits=3, of="gradient"), wanted)[1](wanted)[0]
    steps = jnp.max(jnp.abs(wanted), -1, keepdims=True) / 3.5
    assert bool(jnp.all(jnp.abs(found - wanted) <= 1.0001 * steps))
    inside = jnp.abs(wanted[0]) < 3 * steps[0]
    np.testing.assert_allclose(jnp.where(inside, found.mean(0) - wanted[0], 0), 0, atol=0.04 * float(steps[0].max()))
    assert bool(jnp.all(fake_quant(wanted, bits=3, of="gradient") == wanted))


def test_every_value_that_linears_read_is_rounded_once(tiny, random_store) -> None:
    (step,) = runner.run(tiny, Pipeline.parse("act8").ordered())
    assert parse(dump(step.after)) == step.after
    made = {op.out.name: op for f in step.after.funcs.values() for op in f.ops if op.kind == "fake_quant"}
    assert len({op.inputs[0] for op in made.values()}) == len(made) > 3
    store = random_store(tiny)
    before, after = run(tiny, store, TOKENS), run(step.after, store, TOKENS)
    assert 1e-6 < float(jnp.abs(before - after).max()) < 0.1 * float(jnp.abs(before).max())
    emitted = Model.of(step.after, store)
    logits = emitted.program.forward(emitted.params, TOKENS)
    np.testing.assert_allclose(logits, after, atol=0.02 * float(jnp.abs(after).max()))


def test_linears_that_read_one_value_still_join(tiny) -> None:
    steps = runner.run(tiny, Pipeline.parse("quant4,act8,fuse").ordered())
    assert [step.made_by.name for step in steps] == ["quant4", "act8", "fuse"]
    count = [sum(op.kind == "linear" for f in s.after.funcs.values() for op in f.ops) for s in steps]
    assert count[2] < count[1] == count[0]


def test_static_scales_are_the_greatest_of_the_text(tiny, random_store, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (step,) = runner.run(tiny, Pipeline.parse("act8{scale=static}").ordered())
    store = random_store(tiny)
    text = SimpleNamespace(
        calib="x", ids=np.asarray(TOKENS[0]), head=(), folder=tmp_path, window=24, name="act8", tokenizer=None
    )
    after = step.made_by.arrays(tiny, step.after, store, text, Notes())  # type: ignore[arg-type]
    near = run(step.after, after, TOKENS)
    far = run(tiny, store, TOKENS)
    assert float(jnp.abs(near - far).max()) < 0.1 * float(jnp.abs(far).max())
    scales = [n for n in step.after.params if ".act." in n]
    assert scales
    assert all(after[n].read(0)[""].shape == (1,) and after[n].read(0)[""][0] > 0 for n in scales)
    with pytest.raises(PassError, match="want the context"):
        step.made_by.weights(tiny, step.after, store)


@pytest.mark.parametrize(
    ("text", "said"),
    [("act8", "no faster"), ("act8{group=32}", ""), ("act8{group=16}", "16 divides"), ("act8{group=256}", "no faster")],
)
def test_what_cpus_gain_is_said(tiny, text: str, said: str) -> None:
    (step,) = runner.run(tiny, Pipeline.parse(text).ordered())
    told = [choice for choice in step.notes.choices if "CPUs" in choice]
    assert [said in choice for choice in told] == [True] * bool(said)
