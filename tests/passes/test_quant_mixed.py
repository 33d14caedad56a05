"""mixed: what is measured, how bits are spent, stacks in pieces."""

from __future__ import annotations

import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.evaluate import Windows
from effc.ir.types import Quant
from effc.passes import Mixed, PassError, runner
from effc.passes.context import Context
from effc.passes.quant.spans import cut, loops, outstanding, parse_cuts, spell_cuts
from effc.weights import elements, nbytes


def test_a_stack_in_pieces_is_the_same_model(tiny, random_store, logits) -> None:
    store, pieces = random_store(tiny), cut("x", tiny, {"layer": (1,)})
    runner.check_module("cut", pieces.module)
    assert pieces.module.params["layers_1.attn.q"].stack == 1
    assert pieces.module.params["layers_1.attn.q"].over == (1, 2, 1)
    assert pieces.came["layers_1.mlp.up"] == ("layers.mlp.up", 1)
    np.testing.assert_array_equal(logits(pieces.module, pieces.store(store)), logits(tiny, store))
    assert load_program(emit(pieces.module)).params.keys() >= {"layers_0", "layers_1"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lair:1", "no block 'lair' that can be cut, want layer; did you mean 'layer'"),
        ("layer:2", "want layers from 1 to 1"),
        ("layer:x", "tells no layers"),
    ],
)
def test_cuts_that_cannot_be(text: str, why: str, tiny) -> None:
    with pytest.raises(PassError, match=why):
        runner.step(Mixed(cut=text), tiny)


def test_cuts_are_spelled_back_and_blocks_of_several_loops_stay_whole(tiny) -> None:
    assert spell_cuts(parse_cuts("x", "layer:11+1;other:3")) == "layer:1+11;other:3"
    func = tiny.forward()
    (loop,) = [op for op in func.ops if op.kind == "repeat"]
    twice = tuple(two for op in func.ops for two in ([op, op] if op is loop else [op]))
    assert list(loops(tiny)) == ["layer"]
    assert loops(tiny.with_func(type(func)(func.name, func.inputs, twice, func.results))) == {}


def test_layers_that_stand_out_stand_apart() -> None:
    assert outstanding([9, 1, 1, 1, 1, 1, 1, 8]) == (1, 7)
    assert outstanding([1, 1, 1]) == ()


def test_without_arrays_it_spends_what_it_may(tiny) -> None:
    step = runner.step(Mixed(bits=5.5), tiny)
    names = [name for name, p in step.after.params.items() if isinstance(p.type.dtype, Quant)]
    used = 8 * sum(p.count * p.type.nbytes() for n, p in step.after.params.items() if n in names)
    weights = sum(p.count * int(np.prod(p.type.shape)) for n, p in step.after.params.items() if n in names)  # type: ignore[arg-type]
    assert 5.0 < used / weights <= 5.5


def test_too_few_bits_are_refused(tiny) -> None:
    with pytest.raises(PassError, match=r"mixed: bits=3, want 3\.\d+ or more"):
        runner.step(Mixed(bits=3.0), tiny)


def test_bits_go_where_they_are_missed(tiny, random_store, tmp_path, monkeypatch, logits) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokens = np.random.default_rng(0).integers(0, 160, (1, 32), np.int32)
    store = random_store(tiny)
    lazy = store["layers.attn.v"]
    large = type(lazy)(lazy.param, lambda i: {"": lazy.read(i)[""] * (20.0 if i else 0.1)})  # layer 1's v matters most
    store = store.replace([large], tiny)
    context = Context("mixed", tiny, store, None, Windows((tokens,), 1), None, tmp_path)
    monkeypatch.setattr(Context, "prompts", lambda self, count, length: np.repeat(tokens, 2, 0))
    made_by = Mixed(bits=5.6, tokens=64).decided(tiny, store, context)
    assert made_by == Mixed(bits=5.6, tokens=64).decided(tiny, store, context)  # measured once, then read
    step = runner.step(made_by, tiny)
    after = made_by.arrays(tiny, step.after, store, context, step.notes)
    assert elements(step.after) == elements(tiny)
    assert nbytes(step.after) < nbytes(tiny) * 5.7 / 32 + 2000
    dtypes = {name: p.type.dtype for name, p in step.after.params.items()}
    bits = {name: dtype.bits for name, dtype in dtypes.items() if isinstance(dtype, Quant)}
    last = [name for name in bits if name.endswith("attn.v")][-1]
    assert bits[last] > min(bits.values())
    assert bits[last] == max(count for name, count in bits.items() if ".attn." in name), bits
    moved = np.abs(logits(step.after, after) - logits(tiny, store)).max()
    assert 0 < moved < 0.3 * np.ptp(logits(tiny, store))
