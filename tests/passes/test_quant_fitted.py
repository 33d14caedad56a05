"""Weights fitted to text: statistics, GPTQ, scales that move, budgets, rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from effc.evaluate import Windows
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.stream import Watch, look
from effc.ir.types import Quant
from effc.passes import PassError, Quant4, Quant8, Smooth, runner
from effc.passes.base import Notes
from effc.passes.context import Context
from effc.passes.quant.budget import Choice, spend
from effc.passes.quant.clipping import clipped
from effc.passes.quant.coding import Coder, How
from effc.passes.quant.gptq import gptq, inverse_root
from effc.passes.quant.rules import parse_rules
from effc.passes.quant.scaling import awq, output_error, smooth
from effc.passes.quant.sites import Folded, sites
from effc.passes.quant.statistics import Seen, Statistics, places, statistics
from effc.passes.quantizer import code, rounded, spread
from effc.weights import Store

RNG = np.random.default_rng(0)


@pytest.fixture
def seen(tiny, random_store, tmp_path, monkeypatch) -> Statistics:
    """Of 128 tokens of the tiny model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return _seen(tiny, random_store(tiny), tmp_path)


def _seen(module: Module, store: Store, folder: Path, say: Callable[[str], None] = lambda said: None) -> Statistics:
    tokens = [np.random.default_rng(i).integers(0, 160, (1, 32), np.int32) for i in range(4)]
    return statistics(module, store, tokens, source="test", spare=folder, progress=say)


def inputs(rows: int, width: int) -> np.ndarray:
    """Correlated, some channels much larger than others."""
    x = RNG.standard_normal((rows, width)) @ (np.eye(width) + 0.3 * RNG.standard_normal((width, width)) / width**0.5)
    return (x * np.exp(RNG.standard_normal(width))).astype(np.float32)


# ---- statistics


def test_statistics_are_those_of_what_the_linears_read(tiny, random_store, seen) -> None:
    read: dict[tuple[str, int], list[np.ndarray]] = {}

    def see(func: str, layer: int, values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            read.setdefault((name, layer), []).append(np.asarray(value).reshape(-1, value.shape[-1]))

    tokens = [jnp.asarray(np.random.default_rng(i).integers(0, 160, (1, 32), np.int32)) for i in range(4)]
    value = places(tiny)["layers.mlp.down", 1][0].value
    look(tiny, random_store(tiny), tokens, Watch({"layer": [value]}, see))  # type: ignore[arg-type]
    x, found = np.concatenate(read[value, 1]), seen.of("layers.mlp.down", 1)
    assert found.count == len(x) == 128
    np.testing.assert_allclose(found.square, x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.mean, np.abs(x).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.peak, np.abs(x).max(0), rtol=1e-6)


def test_linears_that_read_one_value_share_its_statistics(tiny, seen) -> None:
    where = places(tiny)
    assert where["layers.attn.q", 0] == where["layers.attn.v", 0] != where["layers.attn.q", 1]
    assert len({place.file for found in where.values() for place in found}) == len(list(seen.folder.glob("*.npz")))


def test_statistics_are_reused_until_the_model_changes(tiny, random_store, seen, tmp_path) -> None:
    said: list[str] = []
    store = random_store(tiny)
    _seen(tiny, store, tmp_path, said.append)
    lazy = store["norm"]
    other = store.replace([replace(lazy, read=lambda i: {"": np.ones(64, np.float32)})], tiny)
    _seen(tiny, other, tmp_path, said.append)
    assert [text.split()[-1] for text in said] == ["reused", "collected"]


def test_arrays_that_several_layers_share_see_all_of_them(tiny, random_store, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    op = next(op for op in tiny.forward().ops if op.kind == "repeat")
    order = replace(op, attrs={**op.attrs, "times": 3, "order": (0, 1, 0)})
    ops = tuple(order if one is op else one for one in tiny.forward().ops)
    module = tiny.with_func(replace(tiny.forward(), ops=ops))
    found = _seen(module, random_store(tiny), tmp_path)
    assert [place.layer for place in found.places["layers.attn.q", 0]] == [0, 2]
    assert found.of("layers.attn.q", 0).count == 2 * found.of("layers.attn.q", 1).count


# ---- GPTQ


@pytest.mark.parametrize(
    ("group", "sym", "ordered"), [(16, True, False), (16, False, True), (0, True, False), (40, True, False)]
)
def test_gptq_changes_outputs_less_than_rounding(group: int, sym: bool, ordered: bool) -> None:
    x, w = inputs(512, 160), RNG.standard_normal((160, 24)).astype(np.float32)
    square, quant = x.T @ x, Quant(4, group, sym)
    near = output_error(rounded(w, quant, "mse") - w, square)
    ours = output_error(spread(*gptq(w, square, quant, "mse", ordered=ordered), group) - w, square)
    assert ours < 0.8 * near


def test_gptq_is_rounding_where_inputs_have_nothing_to_do_with_each_other() -> None:
    w, quant = RNG.standard_normal((64, 8)).astype(np.float32), Quant(4, 16)
    ours = gptq(w, 3 * np.eye(64, dtype=np.float32), quant, "absmax")
    for mine, near in zip(ours, code(w, quant, "absmax"), strict=True):
        np.testing.assert_array_equal(mine, np.broadcast_to(near, mine.shape))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x, w = inputs(256, 32), RNG.standard_normal((32, 4)).astype(np.float32)
    x[:, 5] = 0
    back = spread(*gptq(w, x.T @ x, Quant(4, 8), "mse"), 8)
    assert np.isfinite(back).all()
    assert np.abs(back[5] - w[5]).max() < np.abs(w).max() / 4


def test_the_root_of_the_inverse() -> None:
    x = inputs(400, 24)
    upper = inverse_root(x.T @ x)
    damped = x.T @ x + 0.01 * np.trace(x.T @ x) / 24 * np.eye(24)
    assert np.array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(24), atol=2e-3)


# ---- scales that move


def test_scales_move_without_changing_logits(tiny, random_store, logits) -> None:
    store, found = random_store(tiny), sites(tiny, Notes())
    assert {site.source.kind for site in found} == {"norm", "linear"}
    assert len(found) == 4  # norm1 -> qkv, v -> o, norm2 -> gate and up, up -> down
    folded = Folded(
        store, tuple(found), lambda site, layer: np.exp(np.random.default_rng(layer).standard_normal(site.channels))
    )
    moved = store.replace(folded.made(tiny), tiny)
    assert not np.array_equal(moved["layers.attn.o"].read(0)[""], store["layers.attn.o"].read(0)[""])
    np.testing.assert_allclose(logits(tiny, moved), logits(tiny, store), atol=2e-5)


def test_an_offset_of_a_norm_stays_where_it_is(tiny, random_store, logits) -> None:
    block = tiny.funcs["layer"]
    ops = tuple(replace(op, attrs={**op.attrs, "offset": 1.0}) if op.kind == "norm" else op for op in block.ops)
    module, store = tiny.with_func(replace(block, ops=ops)), random_store(tiny)
    folded = Folded(store, tuple(sites(module, Notes())), lambda site, layer: np.full(site.channels, 3.0))
    np.testing.assert_allclose(
        logits(module, store.replace(folded.made(module), module)), logits(module, store), atol=2e-5
    )


def test_what_others_read_too_is_no_site() -> None:
    module = parse(
        "effc 1 module @m { param @s: f32[64] param @w: f32[64,64] func @forward(%x: f32[b,t,64]) { "
        "%h: f32[b,t,64] = norm(%x) [scale=@s] {kind=rms, eps=1e-05} %y: f32[b,t,64] = linear(%h) [w=@w] "
        "%z: f32[b,t,64] = lax.add(%h, %y) return %z } }"
    )
    assert sites(module, Notes()) == []


def _outliers() -> tuple[Seen, np.ndarray]:
    x = inputs(256, 64)
    x[:, 3] *= 40
    seen = Seen(256, x.T @ x, np.abs(x).mean(0), np.abs(x).max(0))
    return seen, RNG.standard_normal((64, 32)).astype(np.float32)


def _left(seen: Seen, w: np.ndarray, quant: Quant, scale: np.ndarray) -> float:
    """Squared change of outputs where w is coded times a scale."""
    s = scale.astype(np.float32)[:, None]
    importance = np.diagonal(seen.square) / np.square(s[:, 0])
    return output_error(rounded(w * s, quant, "mse", importance) / s - w, seen.square)


def test_awq_beats_rounding_where_channels_differ_and_never_loses() -> None:
    quant, index = Quant(3, 32), np.arange(64)
    seen, w = _outliers()
    scale, exponent = awq(seen, [(w, lambda w, importance: rounded(w, quant, "mse", importance))], index)
    assert exponent > 0
    assert _left(seen, w, quant, scale) < 0.7 * output_error(rounded(w, quant, "mse") - w, seen.square)
    even = Seen(1, np.eye(64, dtype=np.float32), np.ones(64, np.float32), np.ones(64, np.float32))
    scale, _ = awq(even, [(w, lambda w, importance: rounded(w, quant, "mse", importance))], index)
    assert _left(even, w, quant, scale) <= _left(even, w, quant, np.ones(64))


@pytest.mark.parametrize("quant", [Quant(3, 32), Quant(4, 16, sym=False), Quant(4, 0), Quant(4, 32, form="nf4")])
def test_clip_search_lessens_what_outputs_lose(quant: Quant) -> None:
    x = RNG.standard_normal((400, 64)) @ (np.eye(64) + RNG.standard_normal((64, 64)) / 4)
    square, w = (x.T @ x).astype(np.float32), RNG.standard_normal((64, 48)).astype(np.float32)
    codes, scales, zeros = clipped(w, square, quant, "mse")
    plain = rounded(w, quant, "mse", np.diagonal(square).copy())
    assert output_error(spread(codes, scales, zeros, quant.group) - w, square) < 0.95 * output_error(plain - w, square)


def test_a_small_matrix_counts_as_much_as_a_large_one_beside_it() -> None:
    quant, index = Quant(3, 32), np.arange(64)
    seen, w = _outliers()
    rounds = lambda w, importance: rounded(w, quant, "mse", importance)  # noqa: E731
    other = RNG.standard_normal((64, 32)).astype(np.float32)
    found = [awq(seen, [(w, rounds), (size * other, rounds)], index)[0] for size in (1.0, 1e3)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_smoothquant_evens_out_peaks() -> None:
    seen, w = _outliers()
    scale = smooth(seen, [w], np.arange(64), 0.5)
    assert np.ptp(np.log(seen.peak / scale)) < 0.75 * np.ptp(np.log(seen.peak))
    assert scale.max() * scale.min() == pytest.approx(1)


# ---- passes


@pytest.mark.parametrize(("fits", "moves"), [(True, False), (False, True), (True, True)])
def test_fitted_weights_beat_rounding(fits, moves, tiny, random_store, seen, logits) -> None:
    store, made_by = random_store(tiny), Quant4(group=16, rules="@linear:3/16")
    after = runner.step(made_by, tiny).after
    wanted, notes = logits(tiny, store), Notes()
    coder = Coder(How(fits, moves, False, "mse"), tiny, after, store, seen, notes)
    ours = np.square(logits(after, store.replace(coder.made(), after)) - wanted).mean()
    near = np.square(logits(after, made_by.weights(tiny, after, store)) - wanted).mean()
    assert ours < near
    assert sum("outputs off by" in choice for choice in notes.choices) == 7 if fits else True


def test_methods_that_look_at_text_say_so(tiny, random_store) -> None:
    made_by = Quant4.build({"method": "gptq"})
    with pytest.raises(PassError, match="quant4: method=gptq looks at text"):
        made_by.weights(tiny, runner.step(made_by, tiny).after, random_store(tiny))
    assert made_by.reads_text() and not Quant4().reads_text()


# ---- rules


def test_the_first_rule_that_fits_wins(tiny) -> None:
    made_by = Quant4(rules="*.down:8/0;layers.mlp.*:4/16a;@head:4;layers.attn.o:keep")
    params = runner.step(made_by, tiny).after.params
    assert str(params["layers.mlp.down"].type.dtype) == "q8{channel,sym,scale=f16}"
    assert str(params["layers.mlp.up"].type.dtype) == "q4{group=16,asym,scale=f16}"
    assert str(params["embed"].type.dtype) == "q4{group=32,sym,scale=f16,axis=-1}"
    assert params["layers.attn.o"].type.dtype == "f32"
    assert str(params["layers.attn.q"].type.dtype) == "q4{group=32,sym,scale=f16}"


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ("layers.mlp.dwn:8", "'layers.mlp.dwn:8' matches none of 11 names; did you mean 'layers.mlp.down'"),
        ("*.down:8;layers.mlp.down:4", "'layers.mlp.down:4' matches only what cannot be coded or has an earlier rule"),
        ("@heat:8", "speaks of '@heat', want @linear, @embed, @head; did you mean '@head'"),
        ("*.down:9", r"'\*.down:9' is no rule, want the like of"),
        ("*.down", "is no rule"),
    ],
)
def test_rules_that_are_wrong_name_the_nearest(rules: str, why: str, tiny) -> None:
    with pytest.raises(PassError, match=why):
        runner.step(Quant8(rules=rules), tiny)


def test_rules_are_read_in_order() -> None:
    first, second = parse_rules("x", "a*:8/64a; b:keep")
    assert (first.bits, first.group, first.sym, second.bits) == (8, 64, False, 0)


# ---- budget


def test_bits_are_spent_almost_as_well_as_can_be() -> None:
    sizes, harm = (10, 14, 20), RNG.uniform(0.5, 4, 5)
    choices = {str(i): [Choice(str(s), s * (i + 1), h * 4.0 ** -(s / 5)) for s in sizes] for i, h in enumerate(harm)}
    for budget in (160, 200, 260):
        found = spend(choices, budget)
        assert sum(c.nbytes for c in found.values()) <= budget
        fitting = [c for c in product(*choices.values()) if sum(one.nbytes for one in c) <= budget]
        best = min(sum(one.harm for one in c) for c in fitting)
        assert sum(c.harm for c in found.values()) <= 1.25 * best


def test_smooth_is_exact_and_evens_out_what_linears_read(tiny, random_store, tmp_path, monkeypatch, logits) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokens = np.random.default_rng(0).integers(0, 160, (1, 32), np.int32)
    monkeypatch.setattr(Context, "prompts", lambda self, count, length: np.repeat(tokens, 2, 0))
    norm = random_store(tiny)["layers.norm1"]
    wild = replace(norm, read=lambda i: {"": norm.read(i)[""] * np.where(np.arange(64) % 16, 1, 30).astype(np.float32)})
    store = random_store(tiny).replace([wild], tiny)
    step, context = (
        runner.step(Smooth(), tiny),
        Context("smooth", tiny, store, None, Windows((tokens,), 1), None, tmp_path),
    )
    after = step.made_by.arrays(tiny, step.after, store, context, step.notes)
    np.testing.assert_allclose(logits(step.after, after), logits(tiny, store), atol=3e-5)
    peaks = [np.abs(s["layers.norm1"].read(0)[""]) for s in (store, after)]
    assert np.ptp(np.log(peaks[1])) < 0.7 * np.ptp(np.log(peaks[0]))
    assert "4 places where a scale can move" in step.notes.choices[0]
