"""Early exits: what is derived of a module, what programs do, what is trained, what is certified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc import certificate, evaluate
from effc.errors import EffcError
from effc.ir.core import Module, Op, Ref
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.rewrite import replace_ops
from effc.ir.stream import run
from effc.ir.verify import verify
from effc.passes.base import Notes, PassError
from effc.passes.calm import Calm, calibrate, train
from effc.passes.calm.side import agreement, together
from effc.passes.calm.train import both_ways, part, weighted, with_exits
from effc.passes.context import Context, Model
from effc.passes.runner import step
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.sampling import Sampling
from effc.runtime.train import Tick, forward_kl
from effc.runtime.train.budget import Budget
from effc.weights import Store

TINY = (Path(__file__).parent / "tiny.effc").read_text().replace("2 * f32", "6 * f32").replace("times=2", "times=6")
TOKENS = np.random.default_rng(0).integers(0, 160, (2, 6)).astype(np.int32)

Made = tuple[Module, Store]
Make = Callable[..., Made]


@pytest.fixture
def made(random_store: Callable[[Module], Store]) -> Make:
    """The six-layer model with exits, adapters of random arrays so that they do something."""

    def call(text: str = TINY, **options: object) -> Made:
        before = parse(text)
        made_by = Calm(**options)  # type: ignore[arg-type]
        after = step(made_by, before).after
        assert parse(dump(after)) == after
        return after, made_by.weights(before, after, random_store(before)) if not options else random_store(after)

    return call


def _at(module: Module, threshold: float) -> Module:
    """The early function as the forward one, at a threshold: for the interpreter."""

    def settle(op: Op) -> list[Op] | None:
        return [replace(op, attrs={**op.attrs, "threshold": threshold})] if op.kind == "early" else None

    func = replace_ops(module.funcs["early"], settle)
    func = replace(func, results=func.results[:1])
    assert module.decode is not None
    return replace(module.with_func(func), decode=replace(module.decode, attrs={"forward": Ref("early")}))


def test_what_skipped_layers_run_is_what_keys_and_values_depend_on(made: Make):
    module, _ = made()
    keys = module.funcs["layer.keys"]
    assert [op.kind for op in keys.ops] == ["norm", "linear", "linear", "lax.reshape", "lax.reshape", "rope", "keep"]
    assert [op.kind for op in module.funcs["head"].ops] == ["norm", "linear"]
    (early,) = (op for op in module.funcs["early"].ops if op.kind == "early")
    assert early.attrs["exits"] == (2, 4) and early.attrs["times"] == 6
    assert module.forward() == parse(TINY).forward()


@pytest.mark.parametrize(
    ("options", "at"), [({"first": 1, "every": 1, "min_exit": 3}, (3, 4, 5)), ({"first": 5}, (5,)), ({}, (2, 4))]
)
def test_places_of_exits(made: Make, options: dict[str, int], at: tuple[int, ...]):
    module, _ = made(**options)
    assert next(op for op in module.funcs["early"].ops if op.kind == "early").attrs["exits"] == at


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (
            "decode greedy { forward=@forward }",
            "decode speculative { forward=@forward, kind=lookup, gamma=2 }",
            "want greedy",
        ),
        ("(%x0, %cos, %sin) {block=@layer, times=6}", "(%x0, %cos, %sin) {block=@layer, times=3, start=1}", "start=1"),
        ("%n: f32[b,t,64] = norm(%x1)", "%n: f32[b,t,64] = norm(%x0)", "the head reads %x0"),
        ("linear(%h) [w=@layers.attn.k]", "linear(%m0) [w=@layers.attn.k]", "a block of several layers"),
    ],
)
def test_what_cannot_be_left_is_refused_with_the_reason(old: str, new: str, why: str):
    text = TINY.replace(old, new)
    if "m0" in new:  # keys of a second attention that reads the first one's output
        first = TINY[TINY.index("    %h:") : TINY.index("    %m:")]
        for name in ("h", "q0", "k0", "v0", "q1", "k1", "v1", "q2", "k2", "a0", "a1", "a2", "x1"):
            first = first.replace(f"%{name}:", f"%{name}b:").replace(f"%{name},", f"%{name}b,")
            first = first.replace(f"%{name})", f"%{name}b)")
        text = TINY.replace("    %m:", first.replace("norm(%x)", "norm(%x1)") + "    %m:")
    assert text != TINY and (why == "the head reads %x0" or not verify(parse(text)))
    with pytest.raises(PassError, match=why):
        step(Calm(), parse(text))


def test_exits_outside_of_the_stack_are_refused():
    with pytest.raises(PassError, match="no exit from 6 on in 6 layers"):
        step(Calm(min_exit=6), parse(TINY))


@pytest.mark.parametrize(
    ("options", "why"),
    [({"tokens": 1}, "tokens 2 or more"), ({"prompt": 40}, "72 together, want at most the context of 64")],
)
def test_texts_that_cannot_be_generated_are_refused_before_training(options: dict[str, int], why: str):
    with pytest.raises(PassError, match=why):
        step(Calm(**options), parse(TINY))  # type: ignore[arg-type]


def test_a_module_with_wrong_exits_is_told_what_is_wrong(made: Make):
    module, _ = made()
    for old, new, why in [
        ("exits=(2,4)", "exits=(4,2)", "want rising numbers"),
        ("exits=(2,4)", "exits=(2,6)", "from 1 to 5"),
        ("threshold=1.0", "threshold=1.5", "want 0 (always leave) to 1 (never)"),
        ("keys=@layer.keys", "keys=@exit", "keys: @exit wants"),
        ("head=@head", "head=@exit", "defines"),
        ("exits=(2,4)", "exits=(1,2,4)", "stacked 2 times, want 3"),
    ]:
        faults = verify(parse(dump(module).replace(old, new)))
        assert any(why in str(fault) for fault in faults), (new, faults)


EVERY = [(measure, threshold) for measure in ("softmax", "state", "classifier") for threshold in (0.0, 0.02, 1.0)]
SAMPLE = {("softmax", 0.02), ("classifier", 0.0), ("state", 1.0)}


@pytest.mark.parametrize(
    ("measure", "threshold"), [pytest.param(*p, marks=() if p in SAMPLE else pytest.mark.slow) for p in EVERY]
)
def test_the_program_gives_what_the_interpreter_gives(made: Make, measure: str, threshold: float):
    module, store = made(measure=measure)
    threshold = threshold if measure == "softmax" or threshold in (0.0, 1.0) else 0.6
    wanted = run(_at(module, threshold), store, jnp.asarray(TOKENS))
    model = Model.of(module, store)
    call = jax.jit(model.program.entries["early"])
    logits, layers, _ = call(model.params, TOKENS, threshold=threshold)
    np.testing.assert_allclose(logits, wanted, atol=2e-4)
    full = jax.jit(model.program.forward)(model.params, jnp.asarray(TOKENS))
    if threshold == 1:
        assert (np.asarray(layers) == 6).all() and np.abs(np.asarray(logits - full)).max() == 0
    if threshold == 0:
        assert (np.asarray(layers) == 2).all()


def test_generation_counts_layers_and_the_full_model_is_untouched(made: Make, random_store):
    module, store = made(measure="softmax")
    model = Model.of(module, store)
    engine = Engine(model.program, model.params)
    plain = Model.of(parse(TINY), random_store(parse(TINY)))
    prompts = [row.tolist() for row in TOKENS]
    wanted = generate(Engine(plain.program, plain.params), prompts, max_new_tokens=8)
    full = generate(engine, prompts, max_new_tokens=8)  # nothing is certified yet: all layers run
    assert full.tokens == wanted.tokens and full.stats.exits is None and "no threshold" in full.stats.full
    early = generate(engine, prompts, max_new_tokens=8, exits=0.0)
    assert early.stats.exits is not None and early.stats.exits.by_layers == {2: 14}
    assert early.stats.exits.average == 2 and early.tokens != full.tokens
    # A row that has ended is not counted, and rows do not depend on each other.
    stop = early.tokens[0][2]
    ended = generate(engine, prompts[:1], max_new_tokens=8, exits=0.0, stop_ids=[stop])
    assert ended.stats.exits is not None and ended.stats.exits.tokens == early.tokens[0].index(stop)
    mixed = generate(engine, prompts, max_new_tokens=8, exits=0.02)
    alone = [generate(engine, [prompt], max_new_tokens=8, exits=0.02).tokens[0] for prompt in prompts]
    assert mixed.tokens == alone
    # Certified for one text at a time: more run all layers, unless a threshold is asked for.
    decode = {**engine.program.decode, "threshold": 0.02, "tokens": 8, "most": 1}
    single = Engine(replace(engine.program, decode=decode), engine.params)
    assert [generate(single, [prompt], max_new_tokens=8).tokens[0] for prompt in prompts] == alone
    both = generate(single, prompts, max_new_tokens=8)
    assert both.tokens == full.tokens and both.stats.exits is None and "1 text at a time" in both.stats.full
    drawn = generate(single, prompts[:1], max_new_tokens=8, sampling=Sampling(temperature=1.0))
    assert drawn.stats.exits is None and "for the likeliest tokens" in drawn.stats.full
    assert generate(single, prompts, max_new_tokens=8, exits=0.02).tokens == alone


def test_quantized_models_have_exits_too(made: Make, apply, random_store):
    before = parse(TINY)
    module, store, _ = apply(before, random_store(before), "quant4{group=32},calm")
    model = Model.of(module, store)
    result = generate(Engine(model.program, model.params), [TOKENS[0].tolist()], max_new_tokens=6, exits=0.0)
    assert result.stats.exits is not None and result.stats.exits.by_layers == {2: 5}
    assert str(module.params["exits.gate"].type).startswith("q4")


DEFERRED = {"first": 2, "state": "deferred", "waiting": 2}


def test_deferred_layers_stand_in_the_ir_and_read_what_tokens_take_along(made: Make):
    module, store = made(**DEFERRED)
    (early,) = (op for op in module.funcs["early"].ops if op.kind == "early")
    assert (early.attrs["exits"], early.attrs["state"], early.attrs["waiting"]) == ((2,), "deferred", 2)
    assert "state=deferred, waiting=2" in dump(module)
    wanted = run(_at(module, 0.02), store, jnp.asarray(TOKENS))
    model = Model.of(module, store)
    logits, layers, _ = jax.jit(model.program.entries["early"])(model.params, TOKENS, threshold=0.02)
    np.testing.assert_allclose(logits, wanted, atol=2e-4)
    assert {2, 6} == {int(n) for n in layers.ravel()}
    full = jax.jit(model.program.forward)(model.params, jnp.asarray(TOKENS))
    stayed = np.asarray(layers) == 6  # the text before them left early: they do not see that
    np.testing.assert_allclose(np.asarray(logits)[stayed], np.asarray(full)[stayed], atol=1e-5)


def test_generation_with_deferred_layers_is_what_their_definition_says(made: Make):
    module, store = made(**DEFERRED)
    model = Model.of(module, store)
    engine, call = Engine(model.program, model.params), jax.jit(model.program.entries["early"])
    prompts = [row.tolist() for row in TOKENS]
    result = generate(engine, prompts, max_new_tokens=9, exits=0.02)
    for prompt, new in zip(prompts, result.tokens, strict=True):
        whole = jnp.asarray([prompt + new])
        full = model.program.forward(model.params, whole[:, : len(prompt)])
        early = call(model.params, whole, threshold=0.02)[0]
        wanted = [full[0, -1], *early[0, len(prompt) : -1]]
        assert new == [int(jnp.argmax(logits)) for logits in wanted]
    assert result.stats.exits is not None and set(result.stats.exits.by_layers) == {2, 6}


def test_deferred_exits_are_one(made: Make):
    with pytest.raises(PassError, match="state=deferred, want one exit"):
        made(**{**DEFERRED, "every": 2})
    with pytest.raises(PassError, match="waiting is 0"):
        made(**{**DEFERRED, "waiting": 0})
    module, _ = made(**DEFERRED)
    broken = parse(dump(module).replace("waiting=2", "waiting=0"))
    assert any("want 1 or more tokens" in str(fault) for fault in verify(broken))


# -- training ----------------------------------------------------------------------------------------------


def test_written_out_for_training_every_exit_is_what_it_is_in_the_program(made: Make):
    for measure in ("softmax", "classifier"):
        module, store = made(measure=measure)
        wide, count = with_exits(module)
        assert verify(wide) == [] and count == 2
        spread, model = Model.of(wide, store), Model.of(module, store)
        full, first, *rest, _ = jax.jit(spread.program.extend)(spread.params, TOKENS)
        assert len(rest) == (1 if measure == "softmax" else 3)
        np.testing.assert_allclose(full, jax.jit(model.program.forward)(model.params, jnp.asarray(TOKENS)), atol=1e-5)
        leaving = jax.jit(model.program.entries["early"])(model.params, TOKENS, threshold=0.0)[0]
        np.testing.assert_allclose(first, leaving, atol=1e-5)


def _context(module: Module, store: Store, folder: Path, **more: object) -> Context:
    heldout = evaluate.random_windows(160, window=32, tokens=64, seed=0)
    return Context("calm", module, store, None, heldout, None, folder, window=24, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("finetune", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_brings_exits_to_the_last_layer(random_store, tmp_path: Path, finetune: bool):
    before = parse(TINY)
    made_by = Calm(first=3, every=6, finetune=finetune)
    module = step(made_by, before).after
    origin = random_store(before)
    store = made_by.weights(before, module, origin)
    context = _context(before, origin, tmp_path, budget=Budget(steps=25))
    after = made_by.train(module, store, context)
    (fitted,) = context.runs["calm"]
    losses = [row.metrics["exit0"] for row in fitted.history]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    same = np.array_equal(after["layers.attn.q"].read(0)[""], store["layers.attn.q"].read(0)[""])
    assert same == (not finetune)
    assert np.abs(after["exits.down"].read(0)[""]).max() > 0


def test_layers_that_learn_read_texts_as_long_as_the_model_takes(random_store, tmp_path: Path):
    before = parse(TINY)
    context = _context(before, random_store(before), tmp_path)
    vars(context)["ids"], vars(context)["head"] = np.arange(500, dtype=np.int32) % 160, (1,)
    for most, length in ((512, 64), (40, 40)):  # the context of the model is 64
        batch = context.whole(2, most)(0, None)
        assert batch["tokens"].shape == (2, length + 1) and batch["mask"].all() and (batch["tokens"][:, 0] == 1).all()
    vars(context)["ids"] = np.arange(20, dtype=np.int32)
    assert context.whole(1, 512)(3, None)["tokens"].tolist() == [[1, *range(20)]]


def test_a_batch_of_two_lengths_counts_every_token_alike():
    logits = jax.random.normal(jax.random.key(0), (2, 8, 6))

    def extend(params, ids):
        return logits[0, ids], logits[1, ids], None

    loss = train._loss(extend, 1, lambda params, ids: logits[0, ids])
    short, long = np.arange(4)[None] % 8, np.arange(7)[None] % 8
    tick, trees = Tick(jax.random.key(0), jnp.int32(0), jnp.float32(1)), {"student": None, "teacher": None}
    parts = [{"tokens": ids, "mask": np.ones((1, ids.shape[1] - 1), bool)} for ids in (short, long)]
    both = {**parts[0], "whole": parts[1]["tokens"], "whole_mask": parts[1]["mask"]}
    (one, _), (two, _), (together, told) = (loss(trees, batch, tick) for batch in (*parts, both))
    np.testing.assert_allclose(together, (3 * one + 6 * two) / 9, rtol=1e-5)
    assert int(told["count"]) == 9


def test_weights_rise_with_depth_and_early_exits_come_in_last():
    exits, last = [jnp.float32(3.0), jnp.float32(6.0)], jnp.float32(0.0)
    assert float(weighted(exits, last, jnp.float32(0.0))) == pytest.approx(2 * 6 / (2 + 3))
    assert float(weighted(exits, last, jnp.float32(1.0))) == pytest.approx((3 + 12) / (3 + 3))


def test_the_divergence_that_reaches_both_is_kl():
    full, exit = jax.random.normal(jax.random.key(0), (2, 3, 5))
    np.testing.assert_allclose(both_ways(full, exit), forward_kl(full, exit), rtol=1e-5)
    reached = jax.grad(lambda both: both_ways(both[0], both[1]).sum())((full, exit))
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in reached)


def test_exits_learn_from_one_part_of_the_text_and_are_calibrated_on_the_other():
    text = "".join(map(chr, range(100, 200)))
    learnt, rest = part(text, learnt=True), part(text, learnt=False)
    assert learnt is not None and rest is not None and learnt + rest == text and len(rest) == 40
    assert part(None, learnt=True) is None


# -- calibration -------------------------------------------------------------------------------------------


def _calibrated(made: Make, folder: Path, **options: object) -> tuple[Module, Store, Notes]:
    module, store = made(**options)
    notes = Notes()
    plain = parse(TINY)
    context = _context(plain, Store({name: store[name] for name in plain.params}), folder)
    return Calm(**options).calibrate(module, store, context, notes), store, notes  # type: ignore[arg-type]


def test_a_certified_threshold_is_bound_to_weights_and_settings(made: Make, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(calibrate, "TOGETHER", 99)  # batches are another test's
    options = {"prompts": 12, "prompt": 6, "tokens": 4, "delta": 0.6, "measure": "softmax_max"}
    module, store, notes = _calibrated(made, tmp_path, **options)
    assert module.decode is not None
    told = module.decode.attrs
    assert (told["n"], told["delta"], told["tokens"]) == (12, 0.6, 4) and verify(module) == []
    (early,) = (op for op in module.funcs["early"].ops if op.kind == "early")
    assert early.attrs["threshold"] == told["threshold"]
    tried = notes.measured["thresholds"]
    assert tried[0]["threshold"] == 1 and all(row["certified"] for row in tried[:-1])
    certificate.check(module, store, "here")
    again = parse(dump(module))
    certificate.check(again, store, "here")
    with pytest.raises(EffcError, match="calibrated for other weights or settings"):
        certificate.check(replace(module, decode=replace(module.decode, attrs={**told, "delta": 0.5})), store, "here")
    name = "layers.attn.q"
    shifted = replace(store[name], read=lambda i: {"": store[name].read(i)[""] + np.float32(1e-3)})
    with pytest.raises(EffcError, match="calibrated for other weights or settings"):
        certificate.check(module, Store({**store.entries, name: shifted}), "here")


@pytest.mark.slow
def test_what_a_batch_gains_is_told_of_both_ways(made: Make, tmp_path: Path):
    module, store = made()
    prompts = np.random.default_rng(3).integers(0, 160, (8, 5)).tolist()
    gains = together(module, store, _context(parse(TINY), store, tmp_path), prompts, 6, 0.02)
    assert list(gains) == ["masked", "wait"] and min(gains.values()) > 0


def test_how_often_exits_agree_is_told_of_the_full_models_own_texts(made: Make, tmp_path: Path):
    module, store, notes = _calibrated(made, tmp_path, prompts=6, prompt=6, tokens=4)
    shares = notes.measured["agreement"]
    assert list(shares) == [2, 4] and any("exits agree with the last layer on" in line for line in notes.choices)
    prompts = [row.tolist() for row in np.random.default_rng(3).integers(0, 160, (3, 5))]
    model = Model.of(module, store)
    full = generate(Engine(model.program, model.params), prompts, max_new_tokens=7).tokens
    wanted, wide = np.zeros(2), Model.of(with_exits(module)[0], store)
    extend = jax.jit(wide.program.extend)
    for prompt, text in zip(prompts, full, strict=True):
        last, *exits, _ = extend(wide.params, jnp.asarray([prompt + text]))
        at = slice(len(prompt), len(prompt) + 6)
        assert np.array_equal(last[0, at].argmax(-1), text[1:])
        wanted += [np.mean(np.asarray(exit[0, at]).argmax(-1) == text[1:]) / 3 for exit in exits]
    context = _context(parse(TINY), store, tmp_path)
    assert list(agreement(module, store, context, prompts, full).values()) == pytest.approx(list(wanted))


def test_too_few_prompts_leave_the_full_model_and_say_how_many_are_wanted(made: Make, tmp_path: Path):
    options = {"prompts": 5, "prompt": 6, "tokens": 4}
    module, _, notes = _calibrated(made, tmp_path, **options)
    assert module.decode is not None and module.decode.attrs["threshold"] == 1
    assert any("5 calibration prompts, want 29 at least" in line for line in notes.choices)
    assert notes.measured["needed"] == 29 and notes.measured["certified"] is None
