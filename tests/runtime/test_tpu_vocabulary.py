"""The TPU kernel of confidence over the vocabulary in interpret mode against its reference; backend compiles it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from effc.runtime import exits
from effc.runtime.kernels.vocabulary import reference, tpu
from effc.runtime.kernels.vocabulary.reference import Top
from effc.runtime.qarray import QArray

DRAWN = (Phase.explicit, Phase.generate)
"""Each case compiles anew: one that fails is shown as it was drawn."""

CLOSE = {"float32": 1e-5, "bfloat16": 2e-4, "coded": 2e-3}
"""Of logits about one apart: f32 sums; 16 bits of x; 15 bits of x relative to its greatest."""


def head_of(rng: np.random.Generator, case: dict[str, Any]) -> jax.Array | QArray:
    """[K,V] or [V,K], f32 or bf16, or codes in groups along K with scales in a dtype, perhaps zero points."""
    K, V, layout, kind = case["K"], case["V"], case["layout"], case["kind"]
    shape, axis = ((K, V), -2) if layout == "kn" else ((V, K), -1)
    if kind in ("float32", "bfloat16"):
        return jnp.asarray(rng.standard_normal(shape) / K**0.5, kind)
    bits, group = int(kind[1:]), case["group"] if K % (case["group"] or K) == 0 else 0
    grouped = list(shape)
    grouped[axis] = K // (group or K)
    top = 2 ** (bits - 1)
    codes = jnp.asarray(rng.integers(-top, top, shape), jnp.int4 if bits == 4 else jnp.int8)
    scales = jnp.asarray(rng.uniform(0.5, 2, grouped) / top / K**0.5, case["scale"])
    zeros = jnp.asarray(rng.integers(-3, 3, grouped), case["scale"]) if case["zeros"] else None
    return QArray(codes, scales, zeros, bits, group, axis, shape[-1])


CASES = st.fixed_dictionaries(
    {
        "R": st.sampled_from([1, 2, 5, 8, 16]), "K": st.sampled_from([128, 192, 256]), "V": st.integers(2, 700),
        "layout": st.sampled_from(["kn", "nk"]), "kind": st.sampled_from(["float32", "bfloat16", "q8", "q4"]),
        "group": st.sampled_from([0, 32, 64, 128]), "scale": st.sampled_from(["float32", "float16", "bfloat16"]),
        "zeros": st.booleans(), "softcap": st.sampled_from([0.0, 3.0]), "columns": st.sampled_from([0, 128, 256]),
        "short": st.integers(0, 40), "seed": st.integers(0, 2**31),
    }
)  # fmt: skip


def check(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    head = head_of(rng, case)
    x = jnp.asarray(2 * rng.standard_normal((case["R"], case["K"])), jnp.float32)
    assert tpu.fits(x, head, case["layout"])
    how = {"layout": case["layout"], "softcap": case["softcap"], "width": max(case["V"] - case["short"], 2)}
    have = tpu.top(x, head, **how, columns=case["columns"], interpret=True)
    want = reference.top(x, head, **how)
    close = CLOSE["coded" if isinstance(head, QArray) else case["kind"]]
    for mine, theirs in zip(have[0::2], want[0::2], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=close)
    same = np.asarray(want.best - want.second) > 2 * close  # else either may come out first
    np.testing.assert_array_equal(np.asarray(have.token)[same], np.asarray(want.token)[same])
    assert np.all(np.asarray(have.token) < how["width"]) and np.all(np.asarray(have.token) != np.asarray(have.other))


@settings(max_examples=4, deadline=None, phases=DRAWN)
@given(CASES)
def test_largest_next_and_sum_of_what_is_never_written(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, phases=DRAWN)
@given(CASES)
def test_many_heads(case: dict[str, Any]) -> None:
    check(case)


def test_of_equal_logits_the_lower_tokens_come_first() -> None:
    head = jnp.zeros((8, 300)).at[0, jnp.asarray([5, 133, 261])].set(1.0)  # one lane, three chunks, two tiles
    found = tpu.top(jnp.eye(8)[:1], head, columns=256, interpret=True)
    assert [int(found.token[0]), int(found.other[0])] == [5, 133] and float(found.second[0]) == 1.0
    flat = tpu.top(jnp.zeros((1, 8)), head, columns=256, interpret=True)
    assert [int(flat.token[0]), int(flat.other[0])] == [0, 1]
    np.testing.assert_allclose(flat.total, np.log(300), rtol=1e-6)


def test_confidence_is_that_of_exits() -> None:
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((4, 50)) * 3, jnp.float32)
    found: Top = reference.of_logits(logits)
    np.testing.assert_allclose(found.margin(), exits.margin(logits), rtol=1e-5)
    np.testing.assert_allclose(found.likeliest(), exits.likeliest(logits), rtol=1e-5)
