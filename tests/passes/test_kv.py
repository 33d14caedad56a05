"""Narrow caches: what attention sees, with a cache and without, short contexts and long."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.ir.analysis import cache_bytes_per_token
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.stream import run
from effc.passes import PassError, runner
from effc.passes.context import Model
from effc.pipeline import Pipeline
from effc.runtime.cache import cache_shapes, empty_cache
from effc.runtime.coded import seen

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 160, (2, 48)), jnp.int32)


def test_every_attention_says_so(tiny) -> None:
    (step,) = runner.run(tiny, Pipeline.parse("kv8").ordered())
    found = [op for func in step.after.funcs.values() for op in func.ops if op.kind == "attention"]
    assert found and all(op.attrs["cache"] == "i8" for op in found)
    assert parse(dump(step.after)) == step.after
    assert "cache=i8" in dump(step.after)
    assert cache_bytes_per_token(step.after) < cache_bytes_per_token(tiny) / 2
    assert any("bytes a token" in line for line in step.notes.choices)


@pytest.mark.parametrize(("passes", "near"), [("kv8", 0.02), ("kv4", 0.5)])
def test_decoding_is_the_whole_forward(tiny, random_store, passes: str, near: float) -> None:
    store = random_store(tiny)
    (step,) = runner.run(tiny, Pipeline.parse(passes).ordered())
    before, after = run(tiny, store, TOKENS), run(step.after, store, TOKENS)
    gap = float(jnp.abs(before - after).max())
    assert 1e-6 < gap < near * float(jnp.abs(before).max())
    model = Model.of(step.after, store)
    cache = empty_cache(cache_shapes(model.program.extend, model.params, 2), 64)
    pieces = []
    for start, stop in [(0, 5), (5, 6), (6, 40), (40, 41), (41, 48)]:
        logits, cache = model.program.extend(model.params, TOKENS[:, start:stop], cache)
        pieces.append(logits)
    assert str(cache.entries[0].values[0].dtype) == {"kv8": "int8", "kv4": "uint8"}[passes]
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), after, atol=1e-4)


def test_each_row_has_a_scale_of_its_own() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 8)) * np.logspace(-3, 3, 4)[:, None])
    x = x.at[0, 0, 0].set(0)
    for kind, steps in (("i8", 127.5), ("i4", 7.5)):
        back, most = seen(x, kind), jnp.max(jnp.abs(x), -1, keepdims=True)
        assert bool(jnp.all(jnp.abs(back - x) <= most / steps * 0.5001))
        assert bool(jnp.all(back[0, 0, 0] == 0))


def test_models_without_attention_are_refused(tiny) -> None:
    func = tiny.forward()
    lone = parse(
        "effc 1\nmodule @lone {\n  param @e: f32[8,4]\n  func @forward(%t: i32[b,t]) {\n"
        "    %x: f32[b,t,4] = embed(%t) [table=@e]\n    return %x\n  }\n}\n"
    )
    assert func is not None
    with pytest.raises(PassError, match="no attention"):
        runner.run(lone, Pipeline.parse("kv8").ordered())


def test_emitted_programs_name_the_kind(tiny) -> None:
    (step,) = runner.run(tiny, Pipeline.parse("kv4").ordered())
    text = emit(step.after)
    assert 'cache="i4"' in text
    assert load_program(text).extend is not None
