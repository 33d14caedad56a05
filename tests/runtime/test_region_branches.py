"""Branches in native regions: a decode step with early exits is one call, and gives what XLA's loops give."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.runtime import exits, layers
from effc.runtime.cache import Cache, Step, cache_shapes, empty_cache
from effc.runtime.kernels.build import Unbuilt
from effc.runtime.kernels.region import native
from effc.runtime.kernels.region.branch import either
from effc.runtime.qarray import QArray

try:
    native.target(())
except Unbuilt as unbuilt:
    pytest.skip(f"native kernels: {unbuilt}", allow_module_level=True)

WIDTH, VOCAB, AT = 64, 96, (1, 2)


def table(seed: int, *shape: int, axis: int = -2) -> QArray:
    rng = np.random.default_rng(seed)
    grouped = [*shape]
    grouped[axis] = shape[axis] // 32
    codes = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    return QArray(codes, jnp.asarray(rng.uniform(0.0005, 0.002, grouped), jnp.float16), None, 8, 32, axis, shape[-1])


def params() -> dict[str, Any]:
    names = {"q": (WIDTH, WIDTH), "k": (WIDTH, 32), "v": (WIDTH, 32), "o": (WIDTH, WIDTH)}
    stack = [{name: table(10 * i + j, *shape) for j, (name, shape) in enumerate(names.items())} for i in (1, 2, 3)]
    score = jnp.asarray(np.random.default_rng(7).normal(size=(WIDTH, 1)) / 8, jnp.float32)
    leaves = [{"w": table(i, WIDTH, WIDTH), "score": score} for i in (91, 92)]
    return native.packed({"embed": table(0, VOCAB, WIDTH, axis=-1), "layers": stack, "exits": leaves})


def keep(p: dict[str, Any], x: jax.Array, step: Step) -> tuple[jax.Array, ...]:
    h = layers.norm(x, kind="rms", eps=1e-5)
    k, v = (layers.linear(h, p[name]).reshape(*x.shape[:2], -1, 16) for name in "kv")
    cos, sin = layers.rope_table(step.positions, dims=16, theta=1000.0)
    return step.append(layers.rope(k, cos, sin), v)


def run(p: dict[str, Any], x: jax.Array, step: Step) -> jax.Array:
    keys, values = keep(p, x, step)
    q = layers.linear(layers.norm(x, kind="rms", eps=1e-5), p["q"]).reshape(*x.shape[:2], -1, 16)
    a = layers.attention(q, keys, values, step.positions, scale=0.25)
    return x + layers.linear(a.reshape(x.shape), p["o"])


def extend(
    p: Any, tokens: jax.Array, cache: Cache | None, threshold: Any, measure: str = "softmax", waiting: int = 0
) -> Any:
    def leave(own: Any, x: jax.Array) -> Any:
        out = x + layers.linear(layers.norm(x, kind="rms", eps=1e-6), own["w"])
        return (out, layers.linear(x, own["score"])) if measure == "classifier" else out

    def head(x: jax.Array) -> jax.Array:
        return layers.linear(layers.norm(x, kind="rms", eps=1e-5), p["embed"], layout="nk")

    step, x = Step(tokens, cache), layers.embed(tokens, p["embed"])
    stack = exits.Stack(p["layers"], p["exits"], run, keep, leave, head)
    at = AT[:1] if waiting else AT
    logits, ran = exits.early(step, x, stack, at=at, threshold=threshold, measure=measure, waiting=waiting)
    return logits, ran, step.cache()


def written(call: Any, batch: int, threshold: float, tokens: int = 4) -> tuple[Any, list[Any]]:
    """The cache after some tokens, and logits and layers of each."""
    p, out = params(), list[Any]()
    cache = begun(call, p, batch)
    for t in range(tokens):
        ids = jnp.asarray([[(7 * t + 13 * row) % VOCAB] for row in range(batch)], jnp.int32)
        logits, ran, cache = call(p, ids, cache, jnp.float32(threshold))
        out.append((logits, ran))
    return cache, out


def begun(call: Any, p: Any, batch: int) -> Cache:
    """An empty cache, with room for tokens that wait where there are such."""
    shapes = cache_shapes(lambda p, x: (None, extend(p, x, None, 1.0)[2]), p, batch)
    cache, tokens = empty_cache(shapes, 16), jnp.zeros((batch, 1), jnp.int32)
    more = jax.eval_shape(call, p, tokens, cache, jnp.float32(1))[2].entries[len(cache.entries) :]
    return Cache(cache.lengths, (*cache.entries, *(entry.empty(16) for entry in more)))


def middle(call: Any, batch: int) -> float:
    """A threshold at which tokens leave after different layers."""
    ran = {t: {int(n) for _, r in written(call, batch, t)[1] for n in r.ravel()} for t in np.linspace(0.05, 0.95, 19)}
    return float(max(ran, key=lambda t: len(ran[t])))


@pytest.mark.parametrize("flags", native.VARIANTS.values(), ids=native.VARIANTS)
@pytest.mark.parametrize("width", [1, 17, 101])
def test_what_decides(flags: tuple[str, ...], width: int):
    """Each op by itself, in every variant: widths lie about those of vectors."""

    def function(p: Any, x: jax.Array, score: jax.Array, low: jax.Array) -> tuple[jax.Array, ...]:
        h = layers.linear(x, p)
        sure, likely = exits.margin(h), exits.likeliest(h)
        flag = exits.reached(sure, low)
        return sure, likely, flag, exits.select(flag, h, h + 1), layers.linear(h, score)

    rng = np.random.default_rng(width)
    x = jnp.asarray(rng.normal(size=(3, 1, WIDTH)), jnp.float32)
    args = native.pack(table(width, WIDTH, width)), x, jnp.asarray(rng.normal(size=(width, 2)), jnp.float32)
    low = jnp.asarray([[0.0], [0.1], [1.0]], jnp.float32)
    ours = jax.jit(native.regions(function, flags))
    assert ours.lower(*args, low).as_text().count("custom_call @effc_region") == 1
    for mine, wanted in zip(ours(*args, low), function(*args, low), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-3)


def test_ties_are_no_margin():
    """Two likeliest tokens alike, in one lane of a vector and in two."""
    plain = table(0, WIDTH, 48)
    for other in (1, 16, 40):
        codes = plain.codes.at[:, 0].set(127).at[:, other].set(127)
        scales = plain.scales.at[:, 0].set(0.01).at[:, other].set(0.01)
        w = native.pack(QArray(codes, scales, None, 8, 32, -2, 48))
        sure = native.regions(lambda p, x: exits.margin(layers.linear(x, p)))(w, jnp.ones((1, 1, WIDTH)))
        assert (sure == 0).all()


_MORE = [("softmax", 3), ("softmax_max", 1), ("softmax_max", 3), ("classifier", 1), ("classifier", 3)]


@pytest.mark.parametrize("measure", ["softmax", "classifier"])
def test_the_choice_of_the_token_is_in_the_call_and_the_count_of_layers_after_it(measure: str):
    def chosen(p: Any, tokens: jax.Array, cache: Cache, threshold: Any) -> Any:
        logits, ran, cache = extend(p, tokens, cache, threshold, measure=measure)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), ran[:, 0], cache

    shapes = cache_shapes(lambda p, x: (None, extend(p, x, None, 1.0)[2]), params(), 1)
    args = params(), jnp.zeros((1, 1), jnp.int32), empty_cache(shapes, 16), jnp.float32(0.5)
    text = jax.jit(native.regions(chosen)).lower(*args).as_text()
    assert text.count("custom_call @effc_region") == 1 and "stablehlo.reduce" not in text


@pytest.mark.parametrize(
    ("measure", "batch"), [("softmax", 1), *(pytest.param(*more, marks=pytest.mark.slow) for more in _MORE)]
)
def test_a_step_is_one_call_and_gives_what_loops_give(measure: str, batch: int):
    function = partial(extend, measure=measure)
    ours, plain = jax.jit(native.regions(function)), jax.jit(function)
    shapes = cache_shapes(lambda p, x: (None, extend(p, x, None, 1.0)[2]), params(), batch)
    args = params(), jnp.zeros((batch, 1), jnp.int32), empty_cache(shapes, 16), jnp.float32(0.5)
    text = ours.lower(*args).as_text()
    assert text.count("custom_call @effc_region") == 1 and "while" not in text
    for threshold in (0.0, middle(ours, batch), 1.0):
        cache, mine = written(ours, batch, threshold)
        wanted_cache, wanted = written(plain, batch, threshold)
        for (logits, ran), (other, layers_) in zip(mine, wanted, strict=True):
            assert (ran == layers_).all()
            np.testing.assert_allclose(logits, other, atol=2e-3)
        for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(wanted_cache), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


@pytest.mark.parametrize(
    ("measure", "batch"),
    [("classifier", 1), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("softmax", 1), ("softmax", 3)))],
)
def test_a_step_whose_layers_are_deferred_gives_what_loops_give(measure: str, batch: int):
    """One call for one sequence: how many wait in a batch is told by a minimum, which is XLA's."""
    function = partial(extend, measure=measure, waiting=2)
    ours, plain = jax.jit(native.regions(function)), jax.jit(function)

    def chosen(p: Any, tokens: jax.Array, cache: Cache, threshold: Any) -> Any:
        logits, ran, cache = function(p, tokens, cache, threshold)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), ran[:, 0], cache

    if batch == 1:
        args = params(), jnp.zeros((1, 1), jnp.int32), begun(function, params(), 1), jnp.float32(0.5)
        text = jax.jit(native.regions(chosen)).lower(*args).as_text()
        assert text.count("custom_call @effc_region") == 1 and "while" not in text
        assert "dynamic_update_slice" not in text  # what waits is kept by the call, in place
    for threshold in (0.0, middle(ours, batch), 1.0):
        cache, mine = written(ours, batch, threshold, tokens=8)
        wanted_cache, wanted = written(plain, batch, threshold, tokens=8)
        for (logits, ran), (other, layers_) in zip(mine, wanted, strict=True):
            assert (ran == layers_).all()
            np.testing.assert_allclose(logits, other, atol=2e-3)
        assert (cache.entries[-1].count == wanted_cache.entries[-1].count).all()
        for a, b in zip(jax.tree.leaves(cache.entries[:-1]), jax.tree.leaves(wanted_cache.entries[:-1]), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


def test_one_by_one_is_the_batch_and_one_is_the_full_model_bit_for_bit():
    ours = jax.jit(native.regions(extend))
    threshold = middle(ours, 3)
    together = written(ours, 3, threshold)[1]
    alone = written(ours, 1, threshold)[1]
    for (logits, ran), (own, one) in zip(together, alone, strict=True):
        assert (ran[:1] == one).all() and (logits[:1] == own).all()

    def full(p: Any, tokens: jax.Array, cache: Cache, threshold: Any) -> Any:
        step, x = Step(tokens, cache), layers.embed(tokens, p["embed"])
        for each in p["layers"]:
            x = run(each, x, step)
        x = layers.linear(layers.norm(x, kind="rms", eps=1e-5), p["embed"], layout="nk")
        return x, jnp.full(tokens.shape, 3), step.cache()

    cache, out = written(ours, 1, 1.0)
    wanted, plain = written(jax.jit(native.regions(full)), 1, 1.0)
    for (logits, ran), (other, _) in zip(out, plain, strict=True):
        assert (logits == other).all() and (ran == 3).all()
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(wanted), strict=True):
        assert (a == b).all()


def test_a_side_that_regions_do_not_know_leaves_the_branch_to_loops():
    p = params()

    def function(p: Any, x: jax.Array, limit: jax.Array) -> jax.Array:
        h = layers.linear(x, p["layers"][0]["q"])
        flags = exits.reached(jnp.max(h, axis=-1), limit)
        return either(flags, lambda y: jnp.sort(y) * 2, lambda y: layers.linear(y, p["layers"][1]["q"]), h)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, WIDTH)), jnp.float32)
    for limit in (-1e9, 0.999):
        args = p, x, jnp.full((1, 1), limit, jnp.float32)
        np.testing.assert_allclose(jax.jit(native.regions(function))(*args), jax.jit(function)(*args), atol=2e-3)


def test_a_branch_in_a_branch():
    """A stage has one flag: such branches are loops outside, and right."""
    p = params()["layers"]

    def function(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        def twice(y: jax.Array) -> jax.Array:
            flags = exits.reached(jnp.max(layers.linear(y, p[1]["q"]), axis=-1), second)
            return either(flags, lambda z: z + 1, lambda z: layers.linear(z, p[2]["q"]), y)

        h = layers.linear(x, p[0]["q"])
        return either(exits.reached(jnp.max(h, axis=-1), first), twice, lambda y: y * 3, h)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, WIDTH)), jnp.float32)
    ours, plain = jax.jit(native.regions(function)), jax.jit(function)
    for first, second in itertools.product((-1e9, 0.999), repeat=2):
        limits = jnp.full((1, 1), first), jnp.full((1, 1), second)
        np.testing.assert_allclose(ours(x, *limits), plain(x, *limits), atol=5e-3)
