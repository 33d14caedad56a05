"""Softmax however it is spelled, sinks, and scores that are no single product: one layer each, raised and equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effc
from effc.frontend import lower
from effc.frontend.check import check
from effc.frontend.source import Source
from effc.ir import dump, parse
from effc.ir.core import Op
from tests.conformance.checks import unrolled

VOCAB, WIDTH, HEADS, HEAD, CONTEXT = 61, 32, 4, 8, 24

Attend = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""Parameters, q, k, v [b,h,t,8] -> [b,h,t,8]."""


@pytest.fixture(autouse=True)
def usual_promotion() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def causal(z: jax.Array) -> jax.Array:
    return jnp.tril(jnp.ones(z.shape[-2:], bool))


def plain(q: jax.Array, k: jax.Array) -> jax.Array:
    return q @ k.swapaxes(-1, -2) / HEAD**0.5


def hidden(q: jax.Array, k: jax.Array) -> jax.Array:
    z = plain(q, k)
    return jnp.where(causal(z), z, -1e9)


def exps(z: jax.Array) -> jax.Array:
    return jnp.exp(z - z.max(-1, keepdims=True))


def masked_twice(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    z = hidden(q, k)
    return jnp.where(causal(z), jax.nn.softmax(z, -1), 0) @ v


def where(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    z = plain(q, k)
    return jax.nn.softmax(z, -1, where=causal(z)) @ v


def summed_again(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    z = plain(q, k)
    w = jax.nn.softmax(z, -1) * causal(z)
    return w / w.sum(-1, keepdims=True) @ v


def masked_exps(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    e = exps(hidden(q, k)) * causal(q @ k.swapaxes(-1, -2))
    return e / (e.sum(-1, keepdims=True) + 1e-9) @ v


def divided_last(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    e = exps(hidden(q, k))
    return jnp.moveaxis(jnp.moveaxis(e @ v, 1, 2) / jnp.moveaxis(e.sum(-1), 1, 2)[..., None], 2, 1)


def by_inverse(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    e = jnp.exp(jnp.where(causal(q @ k.swapaxes(-1, -2)), plain(q, k), -jnp.inf))
    return e * (1 / e.sum(-1, keepdims=True)) @ v


def by_logarithm(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    z = hidden(q, k)
    return jnp.exp(z - jax.nn.logsumexp(z, -1, keepdims=True)) @ v


def log_softmax(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.exp(jax.nn.log_softmax(hidden(q, k), -1)) @ v


def keys_first(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    w = jax.nn.softmax(jnp.einsum("bhqk->bkhq", hidden(q, k)), 1)
    return jnp.einsum("bkhq,bhkd->bhqd", w, v)


def sink_beside(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    z = hidden(q, k)
    column = jnp.broadcast_to(p["sink"][None, :, None, None], (*z.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([z, column], -1), -1)[..., :-1] @ v


def sink_before(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    z = hidden(q, k)
    column = jnp.broadcast_to(p["sink"].reshape(HEADS, 1, 1), (*z.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([column, z], -1), -1)[..., 1:] @ v


def sink_in_sum(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    z, sink = hidden(q, k), p["sink"][None, :, None, None]
    most = jnp.maximum(z.max(-1, keepdims=True), sink)
    e = jnp.exp(z - most)
    return e / (e.sum(-1, keepdims=True) + jnp.exp(sink - most)) @ v


def one_more(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    e = jnp.exp(hidden(q, k))
    return e / (1 + e.sum(-1, keepdims=True)) @ v


def scaled_by_head(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    z = plain(q, k) * jnp.exp(p["sink"])[:, None, None]
    return jax.nn.softmax(jnp.where(causal(z), z, -1e9), -1) @ v


def scaled_by_place(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    z = plain(q, k) * jnp.log(2.0 + jnp.arange(q.shape[2]))[:, None]
    return jax.nn.softmax(jnp.where(causal(z), z, -1e9), -1) @ v


def two_products(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One product a head, and one whose keys all heads share."""
    z = (q[..., :5] @ k[..., :5].swapaxes(-1, -2) + jnp.einsum("bhqd,bkd->bhqk", q[..., 5:], k[:, 0, :, 5:])) / 3
    return jax.nn.softmax(jnp.where(causal(z), z, -1e9), -1) @ v


LAYERS: list[Attend] = [
    masked_twice, where, summed_again, masked_exps, divided_last, by_inverse, by_logarithm, log_softmax, keys_first,
    scaled_by_head, scaled_by_place, two_products,
]  # fmt: skip
SINKS: list[Attend] = [sink_beside, sink_before, sink_in_sum, one_more]


def model(layers: list[Attend]) -> Source:
    rng = np.random.default_rng(0)
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "sink": (HEADS,)}
    params: Any = {
        f"{n}": {k: rng.normal(size=s, scale=0.1).astype(np.float32) for k, s in shapes.items()}
        for n, _ in enumerate(layers)
    }
    params |= {"embed": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)}

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        b, t = tokens.shape
        x = params["embed"][tokens]
        for n, attend in enumerate(layers):
            p = params[str(n)]
            q, k, v = (y.reshape(b, t, HEADS, HEAD).swapaxes(1, 2) for y in jnp.split(x @ p["qkv"], 3, -1))
            x = x + attend(p, q, k, v).swapaxes(1, 2).reshape(b, t, WIDTH) @ p["out"]
        return x @ params["embed"].T

    return effc.load(forward, params, name="softmaxes", context=CONTEXT)


def attentions(source: Source) -> list[Op]:
    """Those of the program, which must be parsed back from its text and be what the program computes."""
    low = lower(source)
    assert low.notes == []
    assert parse(dump(low.module)) == low.module
    check(low, source)
    return [op for op in unrolled(low.module) if op.kind in {"attention", "lax.dot_general", "window"}]


def test_every_spelling_is_an_attention() -> None:
    found = attentions(model(LAYERS))
    assert [op.kind for op in found] == ["attention"] * len(LAYERS)
    assert not any(op.params for op in found)


def test_sinks_are_parameters_of_attention() -> None:
    found = attentions(model(SINKS))
    assert [(op.kind, "sinks" in op.params) for op in found] == [("attention", True)] * len(SINKS)


def test_layers_with_sinks_are_one_block() -> None:
    module = lower(model([sink_beside] * 3)).module
    (attention,) = [op for op in module.funcs["layer"].ops if op.kind == "attention"]
    assert module.params[attention.params["sinks"]].stack == 3


def test_keys_hidden_after_the_softmax_stay_as_they_are() -> None:
    def local(p: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        z = hidden(q, k)
        near = jnp.arange(z.shape[-1])[None] > jnp.arange(z.shape[-1])[:, None] - 4
        return jnp.where(near, jax.nn.softmax(z, -1), 0) @ v

    source = model([local])
    low = lower(source)
    assert any("weights are masked after they were summed" in note for note in low.notes)
    check(low, source)
