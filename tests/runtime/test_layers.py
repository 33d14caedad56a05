"""Each layer against the plainest way to write it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.runtime import layers
from effc.runtime.kernels import on_tpu

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def plain_attention(q, k, v, positions, *, scale, window=0, softcap=0.0, bias=None):
    """Loops over queries and heads, in f64; keys past a query's position are not even looked at."""
    b, t, h, _ = q.shape
    out = np.zeros((b, t, h, v.shape[-1]))
    for n, i, head in np.ndindex(b, t, h):
        at, group = int(positions[n, i]), head // (h // k.shape[2])
        keys = range(max(0, at - window + 1) if window else 0, at + 1)
        scores = np.array([scale * np.dot(q[n, i, head].astype(float), k[n, j, group]) for j in keys])
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + np.array([bias(at, j, head) for j in keys])
        weights = np.exp(scores - scores.max())
        out[n, i, head] = (weights / weights.sum()) @ np.stack([v[n, j, group] for j in keys])
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"window": 2, "softcap": 1.5}])
def test_attention_is_softmax_over_the_keys_up_to_each_position(groups: int, options: dict[str, Any]) -> None:
    q, k, v = array(2, 3, 4, 8), array(2, 9, groups, 8), array(2, 9, groups, 6)
    positions = np.array([[2, 3, 4], [6, 7, 8]], np.int32)
    got = layers.attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(positions), scale=0.3, **options)
    want = plain_attention(q, k, v, positions, scale=0.3, **options)
    np.testing.assert_allclose(got, want, atol=2e-6)  # f32 sums of at most 9 terms near 1


def test_attention_ignores_unfilled_rows_exactly() -> None:
    q, k, v = (jnp.asarray(x) for x in (array(2, 2, 4, 8), array(2, 8, 2, 8), array(2, 8, 2, 8)))
    positions = jnp.array([[1, 2], [4, 5]])
    dirty_k, dirty_v = np.array(k), np.array(v)
    for row, filled in enumerate((3, 6)):
        dirty_k[row, filled:], dirty_v[row, filled:] = 3e38, -3e38
    clean = layers.attention(q, k, v, positions, scale=0.5)
    dirty = layers.attention(q, jnp.asarray(dirty_k), jnp.asarray(dirty_v), positions, scale=0.5)
    assert (clean == dirty).all()


def test_attention_adds_a_bias_of_query_key_and_head() -> None:
    def bias(i, j, h):
        return (j - i).astype(jnp.float32) * (h + 1).astype(jnp.float32) * 0.1

    q, k, v = array(2, 3, 4, 8), array(2, 7, 2, 8), array(2, 7, 2, 8)
    positions = np.array([[0, 1, 2], [4, 5, 6]], np.int32)
    got = layers.attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(positions), bias, scale=0.5)
    want = plain_attention(q, k, v, positions, scale=0.5, bias=lambda i, j, h: (j - i) * (h + 1) * 0.1)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_attention_repeats_no_keys_in_memory() -> None:
    q, kv = jnp.zeros((1, 1, 8, 4)), jnp.zeros((1, 64, 2, 4))
    jaxpr = jax.make_jaxpr(lambda q, k: layers.attention(q, k, k, jnp.array([[3]])))(q, kv)
    sizes = [var.aval.size for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars]
    assert max(sizes) == kv.size  # scores [8,64] and the keys themselves; repeated keys would be four times this


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(kind: str) -> None:
    x, scale, bias = array(2, 3, 16) * 3 + 1, array(16), array(16)
    got = layers.norm(*map(jnp.asarray, (x, scale, bias)), kind=kind, eps=1e-3, offset=1.0)
    centered = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    want = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3) * (1 + scale) + bias
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_norm_of_bfloat16_is_computed_in_f32() -> None:
    x = jnp.asarray(array(4, 256)).astype(jnp.bfloat16)
    got = layers.norm(x, kind="rms", eps=1e-6)
    want = layers.norm(x.astype(jnp.float32), kind="rms", eps=1e-6).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16 and (got == want).all()


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
@pytest.mark.parametrize("layout", ["kn", "nk"])
def test_linear(rows: int, layout: str) -> None:
    x, w, bias = array(rows, 1, 24), array(24, 10), array(10)
    stored = w if layout == "kn" else w.T
    got = layers.linear(jnp.asarray(x), jnp.asarray(stored), jnp.asarray(bias), layout=layout)
    assert got.shape == (rows, 1, 10)
    np.testing.assert_allclose(got, x @ w + bias, atol=1e-5)


def test_linear_result_has_the_dtype_of_x_or_the_one_asked_for() -> None:
    x, w = jnp.asarray(array(2, 8)).astype(jnp.bfloat16), jnp.asarray(array(8, 4)).astype(jnp.bfloat16)
    assert layers.linear(x, w).dtype == jnp.bfloat16
    wide = layers.linear(x, w, dtype=jnp.float32)
    np.testing.assert_allclose(wide, x.astype(jnp.float32) @ w.astype(jnp.float32), atol=1e-5)


def test_embed() -> None:
    table = array(10, 4)
    ids = jnp.array([[1, 9], [0, 1]])
    assert (layers.embed(ids, jnp.asarray(table)) == table[np.asarray(ids)]).all()


def test_rope_turns_each_pair_by_position_times_frequency() -> None:
    x, positions = array(1, 3, 2, 10), np.array([[0, 5, 1000]])
    cos, sin = layers.rope_table(jnp.asarray(positions), dims=8, theta=100.0, scale=2.0)
    half = np.asarray(layers.rope(jnp.asarray(x), cos, sin))
    pairs = np.asarray(layers.rope(jnp.asarray(x), cos, sin, style="interleaved"))
    for at, n in np.ndindex(3, 4):
        turn = 2.0 * np.exp(1j * float(positions[0, at]) * 100.0 ** (-2 * n / 8))
        want = (x[0, at, :, n] + 1j * x[0, at, :, n + 4]) * turn
        np.testing.assert_allclose(half[0, at, :, n] + 1j * half[0, at, :, n + 4], want, atol=2e-4)
        want = (x[0, at, :, 2 * n] + 1j * x[0, at, :, 2 * n + 1]) * turn
        np.testing.assert_allclose(pairs[0, at, :, 2 * n] + 1j * pairs[0, at, :, 2 * n + 1], want, atol=2e-4)
    assert (half[..., 8:] == x[..., 8:]).all()


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("width", "dtype"), [(8, "float32"), (12, "float32"), (12, "bfloat16")])
def test_rope_for_tpus_is_rope(style: str, width: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a product with zeros and ones, to the bit; what is past the pairs stays as it is."""
    x = jnp.asarray(array(2, 3, 4, width), dtype)
    cos, sin = layers.rope_table(jnp.asarray([[0, 1, 2], [5, 6, 700]]), dims=8, theta=100.0)
    plain = layers.rope(x, cos, sin, style=style)
    monkeypatch.setattr(on_tpu, "either", lambda tpu, default, *arrays: tpu(*arrays))
    with on_tpu.traced():
        turned = layers.rope(x, cos, sin, style=style)
    assert turned.dtype == plain.dtype
    np.testing.assert_array_equal(np.asarray(turned, np.float32), np.asarray(plain, np.float32))


def test_rope_table_takes_given_frequencies() -> None:
    cos, sin = layers.rope_table(jnp.array([[3]]), jnp.array([0.5, 0.25]), dims=4)
    np.testing.assert_allclose(
        np.concatenate([cos, sin], -1)[0, 0], [*np.cos([1.5, 0.75]), *np.sin([1.5, 0.75])], atol=1e-6
    )


def test_activations_and_split() -> None:
    x = jnp.asarray(array(3, 6))
    np.testing.assert_allclose(layers.silu(x), x / (1 + np.exp(-x)), atol=1e-6)
    np.testing.assert_allclose(layers.gelu(x, approx="erf"), jax.nn.gelu(x, approximate=False), atol=1e-6)
    np.testing.assert_allclose(layers.softcap(x, cap=0.5), 0.5 * np.tanh(np.asarray(x) / 0.5), atol=1e-6)
    left, right = layers.split(x, sizes=(2, 4))
    assert (left == x[:, :2]).all() and (right == x[:, 2:]).all()
