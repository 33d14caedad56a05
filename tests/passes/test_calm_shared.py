"""Exits whose state all later layers keep: what is kept does not depend on who left; and a head of the exits' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc import evaluate
from effc.backend import narrow
from effc.backend.to_python import emit
from effc.ir.core import Module, Op, Ref
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.rewrite import replace_ops
from effc.ir.stream import run
from effc.ir.verify import verify
from effc.passes.base import Notes, PassError
from effc.passes.calm import Calm
from effc.passes.calm.train import with_exits
from effc.passes.context import Context, Model
from effc.passes.runner import step
from effc.plan import token_bytes
from effc.runtime.cache import cache_shapes, empty_cache
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.train.budget import Budget
from effc.weights import Store

TINY = (Path(__file__).parent / "tiny.effc").read_text().replace("2 * f32", "6 * f32").replace("times=2", "times=6")
TOKENS = np.random.default_rng(0).integers(0, 160, (2, 6)).astype(np.int32)
SHARED = Calm(state="shared", finetune=True, first=2)


@pytest.fixture
def made(random_store: Callable[[Module], Store]) -> Callable[[Calm], tuple[Module, Store]]:
    """The six-layer model with exits, all arrays random."""

    def call(made_by: Calm = SHARED) -> tuple[Module, Store]:
        after = step(made_by, parse(TINY)).after
        assert parse(dump(after)) == after
        return after, random_store(after)

    return call


def _context(module: Module, store: Store, folder: Path, **more: object) -> Context:
    heldout = evaluate.random_windows(160, window=32, tokens=64, seed=0)
    return Context("calm", module, store, None, heldout, None, folder, window=24, **more)  # type: ignore[arg-type]


def _begun(made_by: Calm, store: Store, folder: Path, text: str = TINY) -> tuple[Module, Store, Notes]:
    """Structure and arrays as the pass leaves them, before anything learns."""
    before, notes = parse(text), Notes()
    after = step(made_by, before).after
    return after, made_by.arrays(before, after, store, _context(before, store, folder), notes), notes


def test_later_layers_make_keys_and_values_of_the_exits_state(made):
    module, _ = made()
    after, text = module.funcs["layer.after"], dump(module)
    makes = {value.name: op for op in after.ops for value in op.outputs}
    read, todo = set[str](), [name for op in after.ops if op.kind == "attention" for name in op.inputs[1:3]]
    while todo:
        name = todo.pop()
        read.add(name)
        todo += makes[name].inputs if name in makes else ()
    assert "at_exit" in read and "x" not in read
    assert "{block=@layer, times=2}" in text and "{block=@layer.after, times=4, start=2}" in text
    assert "state=shared" in text and "after=@layer.after" in text
    assert token_bytes(module) == token_bytes(parse(TINY))


SAMPLE = [("own", 0.02), ("model", 1.0)]
MORE = [("model", 0.0), ("own", 0.0), ("model", 0.02), ("own", 1.0)]


@pytest.mark.parametrize(
    ("head", "threshold"), [*SAMPLE, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]
)
def test_the_program_gives_what_the_interpreter_gives(made, head, threshold):
    module, store = made(replace(SHARED, head=head))

    def settle(op: Op) -> list[Op] | None:
        return [replace(op, attrs={**op.attrs, "threshold": threshold})] if op.kind == "early" else None

    early = replace_ops(module.funcs["early"], settle)
    leaving = replace(module.with_func(replace(early, results=early.results[:1])))
    assert module.decode is not None
    leaving = replace(leaving, decode=replace(module.decode, attrs={"forward": Ref("early")}))
    wanted = run(leaving, store, jnp.asarray(TOKENS))
    model = Model.of(module, store)
    logits, layers, _ = jax.jit(model.program.entries["early"])(model.params, TOKENS, threshold=threshold)
    np.testing.assert_allclose(logits, wanted, atol=2e-4)
    assert {0.0: {2}, 0.02: {2, 6}, 1.0: {6}}[threshold] == {int(n) for n in np.ravel(layers)}
    full = np.asarray(jax.jit(model.program.forward)(model.params, jnp.asarray(TOKENS)))
    stayed = np.asarray(layers) == 6
    # Whoever left before, a token that stays says what the full model says.
    np.testing.assert_allclose(np.asarray(logits)[stayed], full[stayed], atol=1e-5)
    if threshold == 1:
        assert (np.asarray(logits) == full).all()


def test_what_is_kept_does_not_depend_on_who_left(made):
    module, store = made()
    model = Model.of(module, store)
    call = jax.jit(model.program.entries["early"])
    shapes = cache_shapes(lambda p, x: (None, model.program.entries["early"](p, x)[2]), model.params, 2)

    def caches(threshold: float) -> list[np.ndarray]:
        cache, ran = empty_cache(shapes, 16), set[int]()
        for t in range(TOKENS.shape[1]):
            _, layers, cache = call(model.params, TOKENS[:, t : t + 1], cache, threshold=threshold)
            ran |= {int(n) for n in np.ravel(layers)}
        assert ran == {0.0: {2}, 0.02: {2, 6}, 1.0: {6}}[threshold]
        return [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]

    all_layers = caches(1.0)
    for threshold in (0.0, 0.02):
        for mine, theirs in zip(caches(threshold), all_layers, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_of_a_prompt_the_last_token_alone_runs_later_layers(made):
    module, store = made()
    model = Model.of(module, store)
    source = emit(module)
    assert source.count("step.asked()") == 1 and source.count("step.wanted(step.positions)") == 1
    extend = jax.jit(model.program.extend)
    engine, valid = Engine(model.program, model.params), jnp.asarray([6, 4])
    logits, kept = extend(model.params, jnp.asarray(TOKENS), engine.empty(2, 16), valid)
    whole, rows = extend(model.params, jnp.asarray(TOKENS), engine.empty(2, 16))
    for row, count in enumerate((6, 4)):
        np.testing.assert_allclose(logits[row, 0], whole[row, count - 1], atol=1e-5)
    assert kept.lengths.tolist() == [6, 4]
    for mine, theirs in zip(jax.tree.leaves(kept.entries), jax.tree.leaves(rows.entries), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    lowered = [
        extend.lower(model.params, jnp.zeros((1, 16), jnp.int32), engine.empty(1, 16), count)
        for count in (jnp.asarray([16]), None)
    ]
    few, all_rows = ((one.cost_analysis() or {})["flops"] for one in lowered)
    assert few < 0.6 * all_rows
    assert narrow.parts(module.funcs["layer.after"]) and narrow.parts(module.funcs["layer"]) is None


def test_tokens_that_stay_say_what_they_would_have_said(made):
    """No drift: greedy text departs from the full model's at a token that left, or never."""
    module, store = made()
    model = Model.of(module, store)
    engine, call = Engine(model.program, model.params), jax.jit(model.program.entries["early"])
    together = generate(engine, TOKENS.tolist(), max_new_tokens=9, exits=0.02).tokens
    for prompt, beside in zip(TOKENS.tolist(), together, strict=True):
        early = generate(engine, [prompt], max_new_tokens=9, exits=0.02)
        assert early.tokens[0] == beside
        whole = jnp.asarray([prompt + early.tokens[0]])
        logits, layers, _ = call(model.params, whole, threshold=0.02)
        full = model.program.forward(model.params, whole)
        said, meant = (np.asarray(x[0, len(prompt) : -1].argmax(-1)) for x in (logits, full))
        assert early.tokens[0][1:] == said.tolist()
        wrong = said != meant
        assert (np.asarray(layers)[0, len(prompt) : -1][wrong] == 2).all()


def test_before_the_last_layer_the_beginning_is_the_model_itself(random_store, tmp_path: Path):
    """The state at the exit is then what the last layer read anyway: ridge regression finds its own matrices again."""
    before = parse(TINY)
    origin = random_store(before)
    module, store, notes = _begun(replace(SHARED, first=5), origin, tmp_path)
    logits = run(module, store, jnp.asarray(TOKENS))
    wanted = run(before, origin, jnp.asarray(TOKENS))
    assert np.abs(logits - wanted).max() < 0.02 * np.abs(wanted).max()
    assert any("0% of their squares" in choice for choice in notes.choices)
    for name in ("layers.attn.q", "layers.mlp.up"):
        assert all((store[name].read(i)[""] == origin[name].read(i)[""]).all() for i in range(6))


@pytest.mark.parametrize("biased", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_beginning_is_nearer_than_the_layers_own_matrices(random_store, tmp_path: Path, biased: bool):
    text = TINY
    if biased:
        text = text.replace("[w=@layers.attn.k]", "[w=@layers.attn.k, bias=@layers.attn.kb]")
        place = text.index("  param @layers.attn.k:")
        text = f'{text[:place]}  param @layers.attn.kb: 6 * f32[32] = "kb_*"\n{text[place:]}'
    before = parse(text)
    assert not verify(before)
    origin = random_store(before)
    after, fitted, _ = _begun(SHARED, origin, tmp_path, text)
    unfitted = SHARED.weights(before, after, origin)
    wanted = run(before, origin, jnp.asarray(TOKENS))
    off = [float(jnp.mean((run(after, s, jnp.asarray(TOKENS)) - wanted) ** 2)) for s in (fitted, unfitted)]
    assert off[0] < 0.7 * off[1]
    assert all((fitted["layers.attn.k"].read(i)[""] == origin["layers.attn.k"].read(i)[""]).all() for i in (0, 1))


@pytest.mark.slow
def test_training_goes_through_the_layers_as_they_are_served(made, random_store, tmp_path: Path):
    module, store = made(replace(SHARED, head="own"))
    wide, _ = with_exits(module)
    spread, model = Model.of(wide, store), Model.of(module, store)
    full, first, _ = jax.jit(spread.program.extend)(spread.params, TOKENS)
    np.testing.assert_allclose(full, jax.jit(model.program.forward)(model.params, jnp.asarray(TOKENS)), atol=1e-5)
    leaving = jax.jit(model.program.entries["early"])(model.params, TOKENS, threshold=0.0)[0]
    np.testing.assert_allclose(first, leaving, atol=1e-5)
    made_by, origin = replace(SHARED, head="own"), random_store(parse(TINY))
    after, begun, _ = _begun(made_by, origin, tmp_path)
    assert (begun["exits_head"].read(0)[""] == origin["embed"].read(0)[""]).all()
    context = _context(parse(TINY), origin, tmp_path, budget=Budget(steps=25))
    trained = made_by.train(after, begun, context)
    (fitted,) = context.runs["calm"]
    losses = [row.metrics["exit0"] for row in fitted.history]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert {"agreement1", "last_kl"} == set(fitted.looks[0].values)
    assert not (trained["exits_head"].read(0)[""] == begun["exits_head"].read(0)[""]).all()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"finetune": False}, "want finetune=true"),
        ({"every": 2}, "state=shared, want one exit"),
        ({"head": "own", "measure": "classifier"}, "want softmax or softmax_max"),
    ],
)
def test_what_does_not_go_together_is_refused(options, why):
    with pytest.raises(PassError, match=why):
        step(replace(SHARED, **options), parse(TINY))


def test_shared_arrays_are_refused():
    text = TINY.replace("times=6}", "times=6, order=(0,1,2,0,1,2)}").replace("6 * f32", "3 * f32")
    assert not verify(parse(text))
    with pytest.raises(PassError, match="arrays of each layer's own"):
        step(SHARED, parse(text))


def test_a_wrong_module_is_told_what_is_wrong(made):
    module, _ = made(replace(SHARED, head="own"))
    for old, new, why in [
        (", after=@layer.after", "", "want `after` with state=shared"),
        ("state=shared", "state=propagate", "want `after` with state=shared"),
        ("exits=(2)", "exits=(2,4)", "its state is what they all keep"),
        ("after=@layer.after", "after=@layer", "after: @layer wants"),
        ("say=@exit.head", "say=@exit", "say: @exit returns"),
    ]:
        text = dump(module).replace("exits=(2,)", "exits=(2)")
        faults = verify(parse(text.replace(old, new).replace("exits=(2)", "exits=(2,)")))
        assert any(why in str(fault) for fault in faults), (new, faults)


@pytest.mark.parametrize("passes", ["quant8{only=exits*}", "quant4{group=32}", "fuse"])
def test_other_passes_go_with_it(apply, random_store, passes):
    before = parse(TINY)
    calm = "calm{state=shared,finetune=true,first=2,head=own}"
    module, store, _ = apply(before, random_store(before), f"{calm},{passes}")
    coded = str(module.params["exits_head"].type).startswith("q")
    assert coded == (passes != "fuse")
    if "only" in passes:
        assert not any(str(p.type).startswith("q") for n, p in module.params.items() if not n.startswith("exits"))
    model = Model.of(module, store)
    engine, prompt = Engine(model.program, model.params), TOKENS[0].tolist()
    result = generate(engine, [prompt], max_new_tokens=6, exits=0.0)
    assert result.stats.exits is not None and result.stats.exits.by_layers == {2: 5}
    full = model.program.forward(model.params, jnp.asarray([prompt]))
    assert generate(engine, [prompt], max_new_tokens=1).tokens[0] == [int(jnp.argmax(full[0, -1]))]
