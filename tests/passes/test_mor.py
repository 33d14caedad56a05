"""mor without routers: what a fold shares, that deltas of full rank undo it, that emitted is interpreted."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.ir.analysis import param_count
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.passes.mor import Mor
from effc.passes.mor.sharing import fold, unique_parameters
from effc.runtime.engine import Engine
from effc.runtime.weights import load_params
from effc.weights import Lazy, write_safetensors

TINY = (Path(__file__).parent / "tiny.effc").read_text()
LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3


def layers(count: int, text: str = TINY) -> Module:
    """The tiny decoder, deeper."""
    return parse(text.replace("2 * f32", f"{count} * f32").replace("times=2", f"times={count}"))


@pytest.fixture
def six() -> Module:
    return layers(6)


@pytest.mark.parametrize(
    ("share", "init"),
    [("cycle", "lower"), ("sequence", "average"), ("middle-cycle", "stepwise"), ("middle-sequence", "upper")],
)
def test_deltas_of_full_rank_give_the_model_back(six, random_store, apply, logits, share, init):
    store = random_store(six)
    before = logits(six, store)
    after, made, _ = apply(six, store, f"mor{{share={share},init={init},rank=full}}")
    np.testing.assert_allclose(logits(after, made), before, rtol=1e-4, atol=1e-4)


def test_matrices_that_lie_the_other_way_are_relaxed_too(random_store, apply, logits):
    turned = TINY.replace(
        "%up: f32[b,t,96] = linear(%m) [w=@layers.mlp.up]",
        "%up: f32[b,t,96] = linear(%m) [w=@layers.mlp.up] {layout=nk}",
    )
    turned = turned.replace("@layers.mlp.up: 2 * f32[64,96]", "@layers.mlp.up: 2 * f32[96,64]")
    module = layers(6, turned)
    store = random_store(module)
    after, made, _ = apply(module, store, "mor{rank=full}")
    np.testing.assert_allclose(logits(after, made), logits(module, store), rtol=1e-4, atol=1e-4)


def test_the_error_falls_with_the_rank(six, random_store, apply, logits):
    store = random_store(six)
    before = logits(six, store)
    errors = []
    for rank in (0, 16, 64):
        after, made, _ = apply(six, store, f"mor{{init=average,rank={rank}}}")
        errors.append(float(np.abs(logits(after, made) - before).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[0] / 100


@pytest.mark.parametrize(
    "passes", ["mor", "mor{norms=shared}", "mor{rank=4}", "mor{recursions=4,share=sequence,span=1-4}"]
)
def test_unique_parameters_by_formula(six, random_store, apply, passes):
    after, _, (step,) = apply(six, random_store(six), passes)
    made_by = step.made_by
    assert isinstance(made_by, Mor)
    folding = made_by.fold(six).folding
    shared_norms, rank = made_by.norms == "shared", int(made_by.rank)
    deltas = rank * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    wanted = unique_parameters(folding, LAYER + 128 * shared_norms, 128 * (not shared_norms) + deltas)
    assert param_count(after) == wanted + 160 * 64 + 64


def test_layers_are_the_arrays_that_the_order_names(six, random_store, apply):
    store = random_store(six)
    after, made, _ = apply(six, store, "mor{init=upper}")
    assert after.funcs["forward"].ops[3].attrs["order"] == (0, 1, 2, 1, 2, 3)
    for array, layer in enumerate((0, 3, 4, 5)):
        np.testing.assert_array_equal(made["layers.attn.q"].read(array)[""], store["layers.attn.q"].read(layer)[""])
    np.testing.assert_array_equal(made["layers.norm1"].read(4)[""], store["layers.norm1"].read(4)[""])


def test_layers_that_run_an_array_again_can_begin_damped(six, random_store, apply):
    store = random_store(six)
    _, made, (step,) = apply(six, store, "mor{init=even,damp=0.5}")
    for layer, factor in enumerate((1, 1, 1, 0.5, 0.5, 1)):
        wanted = factor * store["layers.norm1"].read(layer)[""]
        np.testing.assert_allclose(made["layers.norm1"].read(layer)[""], wanted, rtol=1e-6)
    assert "layers that run an array again begin with their norms x0.5" in step.notes.choices


def test_layers_damped_to_nothing_are_left_out(six, random_store, apply, logits):
    store = random_store(six)
    after, made, _ = apply(six, store, "mor{init=lower,damp=0}")
    first = parse(dump(six).replace("times=6", "times=4").replace("6 * f32", "4 * f32"))
    short = store.replace([Lazy(first.params[n], _without(store, n)) for n in first.params], first)
    np.testing.assert_allclose(logits(after, made), logits(first, short), rtol=1e-4, atol=1e-4)


def _without(store, name):
    """Layers 0, 1, 2 and 5 of what is stacked."""
    return lambda i: store[name].read((0, 1, 2, 5)[i])


def test_averages_are_of_the_layers_that_share(six, random_store, apply):
    store = random_store(six)
    _, made, _ = apply(six, store, "mor{init=average,norms=shared}")
    for name in ("layers.attn.q", "layers.norm1"):
        mean = (store[name].read(1)[""] + store[name].read(3)[""]) / 2
        np.testing.assert_allclose(made[name].read(1)[""], mean, rtol=1e-6)


@pytest.mark.parametrize(
    ("passes", "tolerance"),
    [
        ("mor{rank=4,share=sequence},fuse", 2e-4),
        ("mor,calm{adapter=none},quant4", 2e-2),  # native kernels round activations too
    ],
)
def test_emitted_is_interpreted_and_decoding_is_prefill(six, random_store, apply, logits, tmp_path, passes, tolerance):
    after, made, _ = apply(six, random_store(six), passes)
    program = load_program(emit(after))
    write_safetensors(tmp_path / "w.safetensors", after, made)
    engine = Engine(program, load_params(tmp_path / "w.safetensors", program.params))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 160, (2, 6)))
    whole = np.asarray(jax.jit(program.forward)(engine.params, tokens))
    np.testing.assert_allclose(whole, logits(after, made), rtol=tolerance, atol=tolerance)
    cache, pieces = engine.empty(2, 16), []
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        piece, cache = engine.extend(tokens[:, start:stop], cache)
        pieces.append(np.asarray(piece))
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=tolerance, atol=tolerance)
    assert len(cache.entries) == 6  # each layer keeps keys of its own, whatever array it takes


def test_the_program_holds_one_array_for_layers_that_share(six, random_store, apply, tmp_path):
    after, made, _ = apply(six, random_store(six), "mor")
    program = load_program(emit(after))
    (file,) = write_safetensors(tmp_path / "w.safetensors", after, made)
    params = load_params(file, program.params)
    held = sum(x.size for x in jax.tree.leaves(params))
    assert held == param_count(after) == unique_parameters(fold(6, 2, "middle-cycle", None), LAYER, 128) + 161 * 64


@pytest.mark.parametrize(
    ("text", "passes", "told"),
    [
        (TINY, "mor", "span=1-0, want layers of 0 to 1"),
        (
            TINY.replace("{block=@layer, times=2}", "{block=@layer, times=2, order=(0,0)}"),
            "mor",
            "folded or cut already",
        ),
        (TINY, "mor{damp=2,share=cycle}", "damp=2, want a factor, 0 to 1"),
        (TINY, "mor{rank=some}", "rank=some, want a whole number or full"),
        (TINY, "mor{span=3}", "span=3, want the first and the last layer, e.g. 1-10"),
        (TINY, "mor{recursions=1,share=cycle}", "recursions=1, want 2 or more"),
        (
            TINY.replace("2 * f32[64,96]", "2 * q8{channel,sym}[64,96]"),
            "mor{share=cycle}",
            "want floats: fold before quantizing",
        ),
    ],
)
def test_what_is_refused(random_store, apply, text, passes, told):
    with pytest.raises(EffcError, match=told.replace("(", r"\(")):
        apply(parse(text), random_store(parse(TINY)), passes)


def test_a_model_without_repeated_layers_is_refused(apply, random_store):
    module = parse(
        "effc 1 module @m { param @w: f32[8,8] func @forward(%x: f32[b,t,8]) "
        "{ %y: f32[b,t,8] = linear(%x) [w=@w] return %y } }"
    )
    with pytest.raises(EffcError, match="repeats no block, want equal layers in a row"):
        apply(module, random_store(module), "mor")
