"""Layers left out and run later: what is shown, what the cache holds after a token that takes all of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.runtime import exits
from effc.runtime.cache import Cache, Step, cache_shapes, empty_cache
from effc.runtime.deferred import Waiting
from effc.runtime.layers import attention, linear, norm

L, D, V, AT, MOST = 5, 16, 32, (2,), 3


def _params() -> Any:
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    layers = [{"q": matrix(D, D), "k": matrix(D, D), "v": matrix(D, D), "o": matrix(D, D)} for _ in range(L)]
    return {"layers": layers, "exits": [{"w": matrix(D, D)}], "embed": matrix(V, D), "beside": matrix(V, D)}


def _heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], 2, D // 2)


def _run(p: Any, x: jax.Array, step: Step, beside: jax.Array) -> jax.Array:
    """A layer that reads something else of each token too, as rotary tables and embeddings by layer are read."""
    n = norm(x + beside, kind="rms", eps=1e-5)
    keys, values = step.append(_heads(linear(n, p["k"])), _heads(linear(n, p["v"])))
    a = attention(_heads(linear(n, p["q"])), keys, values, step.positions, scale=0.3)
    return x + linear(a.reshape(x.shape), p["o"])


def _head(params: Any, x: jax.Array) -> jax.Array:
    return linear(norm(x, kind="rms", eps=1e-5) * 2, params["embed"], layout="nk")


def _extend(params: Any, tokens: jax.Array, cache: Cache | None = None, threshold: Any = 1.0, **options: Any) -> Any:
    step, x, beside = Step(tokens, cache), params["embed"][tokens] * 3, params["beside"][tokens]

    def leave(p: Any, x: jax.Array) -> jax.Array:
        return x + linear(norm(x, kind="rms", eps=1e-5), p["w"]) * 0.1

    stack = exits.Stack(params["layers"], params["exits"], _run, lambda p, x, step: None, leave, partial(_head, params))
    told = {"waiting": MOST, "rest": (beside,), **options}
    logits, layers = exits.early(step, x, stack, at=AT, threshold=threshold, **told)
    return logits, layers, step.cache()


def _full(params: Any, tokens: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
    step, x, beside = Step(tokens, cache), params["embed"][tokens] * 3, params["beside"][tokens]
    for p in params["layers"]:
        x = _run(p, x, step, beside)
    return _head(params, x), step.cache()


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, V, (3, 12)), jnp.int32)


def _stepwise(tokens: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array, list[Cache]]:
    """Logits and layers of each token, and the cache after it."""
    params = _params()
    shapes = cache_shapes(lambda p, x: (None, _full(p, x)[1]), params, tokens.shape[0])
    plain = empty_cache(shapes, 16)
    waiting = Waiting.none([jnp.zeros((tokens.shape[0], 1, D))] * 2, options.get("waiting", MOST))
    cache, out = Cache(plain.lengths, (*plain.entries, waiting)), list[Any]()
    call = jax.jit(partial(_extend, **options))
    for t in range(tokens.shape[1]):
        logits, ran, cache = call(params, tokens[:, t : t + 1], cache)
        out.append((logits, ran, cache))
    logits, layers, caches = zip(*out, strict=True)
    return jnp.concatenate(logits, 1), jnp.concatenate(layers, 1), list(caches)


def _middle(tokens: jax.Array = TOKENS) -> float:
    """A threshold at which about half of the tokens leave."""
    call, tried = jax.jit(_extend), np.linspace(0.01, 0.99, 30)
    found = np.array([call(_params(), tokens, threshold=t)[1].mean() for t in tried])
    return float(tried[np.argmin(abs(found - (AT[0] + L) / 2))])


def _waiting(cache: Cache) -> int:
    entry = cache.entries[-1]
    assert isinstance(entry, Waiting)
    return int(entry.count[0, 0])


def _same_rows(cache: Cache, tokens: jax.Array) -> None:
    """What the cache holds of these tokens is what the full model puts there."""
    wanted = jax.jit(_full)(_params(), tokens)[1]
    for mine, theirs in zip(cache.entries[:-1], wanted.entries, strict=True):
        for a, b in zip(mine.all(), theirs.all(), strict=True):
            np.testing.assert_allclose(a[:, : tokens.shape[1]], b, atol=2e-5)


def test_after_a_token_that_takes_all_layers_the_cache_is_the_full_models():
    _, ran, caches = _stepwise(TOKENS[:1], threshold=_middle(TOKENS[:1]))
    full = [t for t in range(TOKENS.shape[1]) if ran[0, t] == L]
    assert 0 < len(full) < TOKENS.shape[1] and any(_waiting(cache) for cache in caches)
    for t in full:
        assert _waiting(caches[t]) == 0
        _same_rows(caches[t], TOKENS[:1, : t + 1])


def test_what_is_shown_is_the_exits_or_the_full_models_own_whatever_left_before():
    threshold = _middle()
    shown, ran, _ = _stepwise(TOKENS, threshold=threshold)
    masked, layers, _ = jax.jit(_extend)(_params(), TOKENS, threshold=threshold)
    full = jax.jit(_full)(_params(), TOKENS)[0]
    assert (ran == layers).all() and len(np.unique(np.asarray(ran))) == 2
    np.testing.assert_allclose(shown, masked, atol=2e-5)
    np.testing.assert_allclose(shown[np.asarray(ran) == L], full[np.asarray(ran) == L], atol=2e-5)


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_wait_than_may_and_who_is_forced_still_leaves(most: int):
    shown, ran, caches = _stepwise(TOKENS, threshold=0.0, waiting=most)
    assert (ran == AT[0]).all()
    assert [_waiting(cache) for cache in caches] == [(t + 1) % (most + 1) for t in range(TOKENS.shape[1])]
    _same_rows(caches[most], TOKENS[:, : most + 1])
    np.testing.assert_allclose(shown, jax.jit(_extend)(_params(), TOKENS, threshold=0.0)[0], atol=2e-5)


def test_a_batch_is_its_rows_one_by_one():
    threshold = _middle()
    shown, ran, _ = _stepwise(TOKENS, threshold=threshold)
    for row in range(TOKENS.shape[0]):
        alone, own, _ = _stepwise(TOKENS[row : row + 1], threshold=threshold)
        assert (own[0] == ran[row]).all()
        np.testing.assert_allclose(alone[0], shown[row], atol=2e-5)


def test_one_is_the_full_model_bit_for_bit():
    shown, ran, caches = _stepwise(TOKENS, threshold=1.0)
    params, cache = _params(), empty_cache(cache_shapes(_full, _params(), TOKENS.shape[0]), 16)
    call, logits = jax.jit(_full), list[jax.Array]()
    for t in range(TOKENS.shape[1]):
        out, cache = call(params, TOKENS[:, t : t + 1], cache)
        logits.append(out)
    assert (shown == jnp.concatenate(logits, 1)).all() and (ran == L).all()
    for a, b in zip(jax.tree.leaves(caches[-1].entries[:-1]), jax.tree.leaves(cache.entries), strict=True):
        assert (a == b).all()
