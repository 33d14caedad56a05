"""quant4 and quant8: which parameters, how, what is said, and what is stored."""

from __future__ import annotations

import numpy as np
import pytest

from effc.errors import EffcError
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.types import Quant
from effc.passes import Notes, PassError, Quant4, Quant8, runner
from effc.passes.weight_rules import fitting_group, head_params
from effc.runtime import forms
from effc.weights import nbytes, parts


def types(module: Module) -> dict[str, str]:
    return {name: str(param.type.dtype) for name, param in module.params.items() if len(param.type.shape) == 2}


def test_defaults_are_careful_with_the_tied_head(tiny) -> None:
    step = runner.step(Quant4(), tiny)
    found = types(step.after)
    assert found.pop("embed") == "q8{channel,sym,scale=f16,axis=-1}"
    assert set(found.values()) == {"q4{group=32,sym,scale=f16}"}
    assert head_params(tiny) == {"embed"}
    assert "embed: embedding and head, 8 bits with one scale a row" in step.notes.choices
    assert "3 vectors (norm scales, biases) left as they are" in step.notes.choices


def test_options_reach_the_types(tiny) -> None:
    made = Quant4.build({"group": "16", "sym": "false", "scale": "f32", "embed": "4", "head": "4"})
    found = types(runner.step(made, tiny).after)
    assert found.pop("embed") == "q4{group=16,asym,axis=-1}"
    assert set(found.values()) == {"q4{group=16,asym}"}


def test_the_more_careful_of_two_widths_for_a_tied_table(tiny) -> None:
    assert types(runner.step(Quant4(embed=4), tiny).after)["embed"].startswith("q8")
    step = runner.step(Quant4(head=0), tiny)
    assert types(step.after)["embed"] == "f32"
    assert step.notes.skips == [("embed", "left as it is by head=0")]


def test_patterns_choose_and_spare(tiny) -> None:
    after = runner.step(Quant8(only="layers.attn.*|embed", skip="*.o"), tiny).after
    coded = {name for name, dtype in types(after).items() if dtype != "f32"}
    assert coded == {"embed", "layers.attn.q", "layers.attn.k", "layers.attn.v"}


@pytest.mark.parametrize("option", ["only", "skip"])
def test_a_pattern_that_fits_nothing_names_the_nearest(option: str, tiny) -> None:
    made = Quant4.build({option: "layers.mlp.dwn"})
    with pytest.raises(
        PassError, match=f"quant4: {option}: 'layers.mlp.dwn' matches none of 11 names; .*'layers.mlp.down'"
    ):
        runner.step(made, tiny)


def test_impossible_groups_are_refused(tiny) -> None:
    with pytest.raises(PassError, match="quant4: group=1, want 0"):
        runner.step(Quant4(group=1), tiny)


@pytest.mark.parametrize(
    ("extent", "group", "wanted"),
    [
        (96, 32, 32),
        (100, 32, 25),
        (64, 64, 0),
        (48, 64, 0),
        (97, 32, 0),
        (576, 0, 0),
        (192, 128, 96),
        (4, 32, 0),
    ],
)
def test_a_group_that_divides(extent: int, group: int, wanted: int) -> None:
    assert fitting_group(extent, group) == wanted


def test_a_group_that_does_not_divide_is_told() -> None:
    module = parse(
        "effc 1 module @m { param @w: f32[100,64] param @v: f32[64,64] func @forward(%x: f32[b,t,100]) "
        "{ %h: f32[b,t,64] = linear(%x) [w=@w] %y: f32[b,t,64] = linear(%h) [w=@v] return %y } }"
    )
    step = runner.step(Quant4(), module)
    assert "w: 32 does not divide 100, groups of 25" in step.notes.choices


LEFT = {
    "read by 'lax.dot_general', not only by linears and embeddings": (
        "%w0: f32[64,64] = param() [value=@w] %y: f32[b,t,64] = lax.dot_general(%x, %w0) "
        "{dimension_numbers=(((2,),(0,)),((),()))}"
    ),
    "read along both of its axes": (
        "%h: f32[b,t,64] = linear(%x) [w=@w] %y: f32[b,t,64] = linear(%h) [w=@w] {layout=nk}"
    ),
    "read by no op": "%y: f32[b,t,64] = silu(%x)",
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_alone_and_why(why: str) -> None:
    text = "effc 1 module @m {{ param @w: f32[64,64] func @forward(%x: f32[b,t,64]) {{ {} return %y }} }}"
    module = parse(text.format(LEFT[why]))
    step = runner.step(Quant4(), module)
    assert step.after == module
    assert step.notes.skips == [("w", why.replace("lax.dot_general", "param"))]


def test_routers_are_left_alone() -> None:
    module = parse(
        "effc 1 module @m { param @w: f32[64,8] param @v: f32[8,64] func @forward(%x: f32[b,t,64]) "
        "{ %h: f32[b,t,8] = linear(%x) [w=@w] %y: f32[b,t,64] = linear(%h) [w=@v] return %y } }"
    )
    step = runner.step(Quant4(), module)
    assert step.notes.skips == [("w", "has 8 outputs, fewer than 32: a gate or router")]


@pytest.mark.parametrize("passes", ["quant4", "quant4{sym=false,scale=bf16}", "quant8", "quant8{group=16}"])
def test_bytes_are_those_of_the_types(passes: str, tiny, random_store, apply) -> None:
    after, store, _ = apply(tiny, random_store(tiny), passes)
    made = sum(a.nbytes for n, p in after.params.items() for i in range(p.count) for a in store[n].read(i).values())
    assert made == nbytes(after) == sum(p.count * p.type.nbytes() for p in after.params.values())
    for name, param in after.params.items():
        arrays = store[name].read(0)
        assert {k: (a.dtype, a.shape) for k, a in arrays.items()} == {
            k: (p.dtype, p.shape) for k, p in parts(param.type).items()
        }


def test_the_error_of_every_parameter_is_told(tiny, random_store) -> None:
    before, made_by, notes = random_store(tiny), Quant4(group=16, sym=False), Notes()
    after = runner.step(made_by, tiny).after
    store = made_by.arrays(tiny, after, before, None, notes)  # type: ignore[arg-type]
    for name in ("layers.attn.q", "layers.mlp.down"):
        off = []
        for i in range(2):
            stored, w = store[name].read(i), before[name].read(i)[""]
            codes = forms.unpack(stored["codes"], w.shape[1], 4)
            scales, zeros = (stored[part].astype(np.float32).repeat(16, 0) for part in ("scales", "zeros"))
            off.append(np.linalg.norm((codes - zeros) * scales - w) / np.linalg.norm(w))
        assert f"{name}: weights off by {np.mean(off):.2%}, {max(off):.2%} in layer {np.argmax(off)}" in notes.choices


def test_spared_parameters_are_the_same_bytes(tiny, random_store, apply) -> None:
    before = random_store(tiny)
    _, after, _ = apply(tiny, before, "quant4{skip=layers.mlp.*}")
    for name in ("layers.mlp.up", "layers.norm1", "norm"):
        assert after[name].read(0)[""].tobytes() == before[name].read(0)[""].tobytes()


def test_layers_of_a_stack_are_coded_each_by_itself(tiny, random_store, apply) -> None:
    before = random_store(tiny)
    _, after, _ = apply(tiny, before, "quant4")
    for i in range(2):
        arrays = after["layers.attn.q"].read(i)
        again = Quant4().made(tiny, runner.step(Quant4(), tiny).after, before)
        lazy = next(lazy for lazy in again if lazy.param.name == "layers.attn.q")
        assert all((lazy.read(i)[k] == arrays[k]).all() for k in arrays)
    assert not np.array_equal(after["layers.attn.q"].read(0)["codes"], after["layers.attn.q"].read(1)["codes"])


@pytest.mark.parametrize(("passes", "limit"), [("quant8", 0.05), ("quant4{group=16}", 0.35)])
def test_logits_move_little(passes: str, limit: float, tiny, random_store, apply, logits) -> None:
    store = random_store(tiny)
    wanted = logits(tiny, store)
    moved = np.max(np.abs(wanted - logits(*apply(tiny, store, passes)[:2]))) / np.ptp(wanted)
    assert 0 < moved < limit


def test_nan_weights_are_named(tiny, random_store, apply) -> None:
    store = random_store(tiny)
    broken = dict(store.entries)
    lazy = broken["layers.attn.q"]
    broken["layers.attn.q"] = type(lazy)(lazy.param, lambda i: {"": np.where(np.eye(64), np.nan, 1).astype("f4")})
    _, after, _ = apply(tiny, type(store)(broken), "quant4")
    with pytest.raises(EffcError, match=r"layers.attn.q\[1\]: .*NaN"):
        after["layers.attn.q"].read(1)


def test_a_coded_parameter_is_not_coded_again(tiny) -> None:
    once = runner.step(Quant4(), tiny).after
    step = runner.step(Quant8(), once)
    assert step.after == once
    assert ("layers.attn.q", "is q4{group=32,sym,scale=f16} already") in step.notes.skips
    assert all(isinstance(once.params[name].type.dtype, Quant) for name, why in step.notes.skips)
