"""The TPU attention kernel in interpret mode against its reference; tests/backend compiles it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from effc.runtime import layers
from effc.runtime.cache import write
from effc.runtime.coded import Split
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.attention import append, choice, reference, tiling, tpu

DRAWN = (Phase.explicit, Phase.generate)
"""Each case compiles anew: one that fails is shown as it was drawn."""

CLOSE = {("int8", "float32"): 1e-3, ("bfloat16", "float32"): 2e-5, ("float32", "float32"): 2e-6}
"""Root mean square of the difference over that of the result: digits of 15 bits and 14 bits; 16 bits; f32."""

NARROW = 6e-3
"""Where queries or weights are bf16, 8 bits."""


def drawn(seed: int, b: int, t: int, h: int, g: int, d: int, S: int, kv: str, q: str) -> tuple[Any, ...]:
    """Operands of `attend`; rows past each sequence's length hold large numbers, which must not be seen."""
    rng = np.random.default_rng(seed)
    positions = jnp.asarray(rng.integers(0, S - t + 1, b)[:, None] + np.arange(t), jnp.int32)
    past = np.arange(S)[None, :] > np.asarray(positions)[:, -1:]
    queries = jnp.asarray(rng.standard_normal((b, t, h, d)), q)
    if kv == "int8":
        keys, values = (jnp.asarray(rng.integers(-127, 128, (b * g, S, d)), jnp.int8) for _ in "kv")
        scales = rng.uniform(0.002, 0.03, (2, b, g, S)).astype(np.float32)
        scales = np.where(past[None, :, None], 1e6, scales)
        return queries, keys, values, (jnp.asarray(scales[0]), jnp.asarray(scales[1])), positions
    far = np.repeat(past, g, axis=0)[..., None]
    keys, values = (jnp.asarray(np.where(far, 1e6, rng.standard_normal((b * g, S, d))), kv) for _ in "kv")
    return queries, keys, values, None, positions


def gap(have: jax.Array, want: jax.Array) -> float:
    mine, theirs = (np.asarray(x, np.float64) for x in (have, want))
    return float(np.sqrt(np.mean((mine - theirs) ** 2) / np.mean(theirs**2)))


SMALL = {"b": st.just(2), "t": st.sampled_from([1, 3]), "r": st.sampled_from([1, 3]), "g": st.just(2)}

CASES = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3), "t": st.sampled_from([1, 2, 3, 5, 16]), "r": st.sampled_from([1, 2, 3, 4, 8]),
        "g": st.sampled_from([1, 2, 3, 4]), "d": st.sampled_from([16, 64, 128]), "S": st.sampled_from([64, 128, 200]),
        "kv": st.sampled_from(["int8", "bfloat16", "float32"]), "q": st.sampled_from(["float32", "bfloat16"]),
        "window": st.sampled_from([0, 7, 100]), "softcap": st.sampled_from([0.0, 5.0]), "sinks": st.booleans(),
        "block": st.sampled_from([0, 128]), "seed": st.integers(0, 2**31),
    }
)  # fmt: skip


def check(case: dict[str, Any]) -> None:
    """One drawn case; keys that do not fill the last block are among them."""
    h = case["r"] * case["g"]
    operands = drawn(case["seed"], case["b"], case["t"], h, case["g"], case["d"], case["S"], case["kv"], case["q"])
    sinks = jnp.linspace(-1, 2, h) if case["sinks"] else None
    how = {"scale": case["d"] ** -0.5, "window": case["window"], "softcap": case["softcap"]}
    block = case["block"] if case["S"] > 128 else 0
    have = tpu.attend(*operands, sinks=sinks, **how, interpret=True, block=block)
    want = reference.attend(*operands, sinks=sinks, **how)
    assert have.dtype == want.dtype and gap(have, want) < CLOSE.get((case["kv"], case["q"]), NARROW)


@settings(max_examples=3, deadline=None, phases=DRAWN)
@given(CASES, st.fixed_dictionaries(SMALL))
def test_it_is_attention_over_the_cache(case: dict[str, Any], small: dict[str, Any]) -> None:
    check(case | small)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, phases=DRAWN)
@given(CASES)
def test_many_cases(case: dict[str, Any]) -> None:
    check(case)


def test_its_reference_is_what_layers_compute() -> None:
    q, keys, values, _, positions = drawn(5, 2, 3, 6, 2, 16, 40, "float32", "float32")
    k, v = (x.reshape(2, 2, 40, 16).swapaxes(1, 2) for x in (keys, values))
    sinks = jnp.linspace(-1, 2, 6)
    how: dict[str, Any] = {"scale": 0.25, "window": 9, "softcap": 4.0}
    want = layers.attention(q, k, v, positions, sinks=sinks, **how)
    assert gap(reference.attend(q, keys, values, None, positions, sinks, **how), want) < 1e-6


def test_products_of_codes_are_exact() -> None:
    """One key is seen: the result is its value, codes times scale, to the last bit but one of f32."""
    q, keys, values, scales, _ = drawn(3, 1, 1, 4, 2, 16, 64, "int8", "float32")
    have = tpu.attend(q, keys, values, scales, jnp.zeros((1, 1), jnp.int32), interpret=True)
    want = np.repeat(np.asarray(values[:, 0], np.float64) * np.asarray(scales[1])[0, :, :1], 2, axis=0)
    np.testing.assert_allclose(np.asarray(have)[0, 0], want, rtol=3e-7)


def test_steps_are_as_long_as_pays() -> None:
    llama = tiling.Form(8, 4, 128, 2048, 2048, "int8", True, 1.0, 0, 0.0)
    assert [tiling.block_of(llama, 8, kind) for kind in ("v5e", "v6e")] == [1024, 2048]
    assert tiling.block_of(llama, 1, "v6e") == 1024, "the first fill counts where steps are few"
    small = tiling.Form(8, 4, 128, 2048, 512, "int8", True, 1.0, 0, 0.0)
    assert tiling._share(small, "v5e") > tiling.SLACK, "and schedules have to leave HBM its time"
    assert (llama.pack, llama.tall) == (2, 8)


def test_codes_are_left_to_xla_where_the_matrix_unit_takes_none() -> None:
    q, codes, floats = jnp.zeros((1, 1, 4, 16)), jnp.zeros((2, 64, 16), jnp.int8), jnp.zeros((2, 64, 16))
    for generation, taken in (("v4", False), ("v5e", True), ("tpu7x", True)):
        with on_tpu.traced(generation):
            assert tpu.fits(q, codes, codes, 2) == taken and tpu.fits(q, floats, floats, 2)


# -- new rows in caches -------------------------------------------------------------------------------------


APPENDED = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3), "t": st.integers(1, 16), "g": st.sampled_from([1, 3, 8]),
        "S": st.sampled_from([20, 64, 150, 256]), "d": st.sampled_from([8, 128]), "seed": st.integers(0, 2**31),
    }
)  # fmt: skip


def check_append(case: dict[str, Any]) -> None:
    """int8 codes, their scales, floats and halves in one call; rows may begin anywhere, at stretches' ends too."""
    rng, b, n, t, S = np.random.default_rng(case["seed"]), case["b"], case["b"] * case["g"], case["t"], case["S"]
    near = rng.choice([0, 30, 31, 32, 120, 127, S - t], b)
    lengths = jnp.asarray(np.clip(near, 0, S - t), jnp.int32)
    kinds = [((case["d"],), "int8"), ((case["d"],), "float32"), ((case["d"],), "bfloat16"), ((), "float32")]
    olds, news = (
        [jnp.asarray(rng.integers(-127, 128, (n, size, *rest)), kind) for rest, kind in kinds] for size in (S, t)
    )
    fit = [append.fits(old, t, b) for old in olds]
    assert fit == [True] * 3 + [b == 1 or case["g"] == 8]
    olds, news = (list[Any](x for x, taken in zip(v, fit, strict=True) if taken) for v in (olds, news))
    if fit[3]:  # beside them, rows that the kernel itself makes codes and scales of; one of zeros among them
        floats = jnp.asarray(rng.standard_normal((n, t, case["d"])), jnp.float32).at[0, 0].set(0)
        olds.append(Split.of(jnp.asarray(rng.standard_normal((n, S, case["d"])), jnp.float32)))
        news.append(floats)
        assert append.fits_split(olds[-1], t, b)
    have = append.append(olds, news, lengths, interpret=True)
    for mine, old, new in zip(have, olds, news, strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, choice._written(write, old, new, lengths))


@settings(max_examples=3, deadline=None, phases=DRAWN)
@given(APPENDED)
def test_rows_are_written_where_sequences_end(case: dict[str, Any]) -> None:
    check_append(case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, phases=DRAWN)
@given(APPENDED)
def test_many_rows(case: dict[str, Any]) -> None:
    check_append(case)


def test_rows_past_the_end_are_dropped() -> None:
    """XLA would move them over what is there; those that fit are written."""
    old, new = jnp.zeros((2, 40, 8)), jnp.arange(1.0, 49).reshape(2, 3, 8)
    [have] = append.append([old], [new], jnp.asarray([38, 45]), interpret=True)
    np.testing.assert_array_equal(have[0, 38:], new[0, :2])
    assert not have[0, :38].any() and not have[1].any()
