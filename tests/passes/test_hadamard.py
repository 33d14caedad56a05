"""Values turned and turned back: the same logits, smaller outliers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from effc.ir.parser import parse
from effc.ir.stream import run
from effc.passes import PassError, runner
from effc.passes.base import Notes
from effc.passes.hadamard import hadamard, turns
from effc.pipeline import Pipeline

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 160, (2, 40)), jnp.int32)


@pytest.mark.parametrize("size", [1, 2, 12, 64, 7])
def test_it_is_orthonormal_and_symmetric(size: int) -> None:
    h = hadamard(size)
    np.testing.assert_allclose(h @ h.T, np.eye(size), atol=1e-12)
    np.testing.assert_array_equal(h, h.T)


def test_logits_stay(tiny, random_store, apply) -> None:
    store = random_store(tiny)
    after, arrays, steps = apply(tiny, store, "hadamard")
    names = turns(tiny, Notes())
    assert len(names) >= 2
    for name in names:
        assert not np.allclose(arrays[name].read(0)[""], store[name].read(0)[""])
        assert np.isclose(np.linalg.norm(arrays[name].read(0)[""]), np.linalg.norm(store[name].read(0)[""]), rtol=1e-5)
    near, far = run(after, arrays, TOKENS), run(tiny, store, TOKENS)
    np.testing.assert_allclose(near, far, atol=1e-5 * float(jnp.abs(far).max()))
    assert steps[0].made_by.name == "hadamard"


def test_outliers_are_spread(tiny, random_store, apply) -> None:
    store = random_store(tiny)
    name = next(n for n, t in turns(tiny, Notes()).items() if t.axis == -1)
    lazy = store[name]
    loud = type(lazy)(
        lazy.param,
        lambda i: {
            "": lazy.read(i)[""] * np.where(np.arange(lazy.read(i)[""].shape[-1]) == 3, 30, 1).astype(np.float32)
        },
    )
    _, arrays, _ = apply(tiny, store.replace([loud], tiny), "hadamard")
    before, after = (np.abs(one.read(0)[""]).max(0) for one in (loud, arrays[name]))
    assert after.max() < before.max() / 2


def test_models_without_attention_are_refused() -> None:
    lone = parse(
        "effc 1\nmodule @lone {\n  param @e: f32[8,4]\n  func @forward(%t: i32[b,t]) {\n"
        "    %x: f32[b,t,4] = embed(%t) [table=@e]\n    return %x\n  }\n}\n"
    )
    with pytest.raises(PassError, match="no attention in lone"):
        runner.run(lone, Pipeline.parse("hadamard").ordered())
