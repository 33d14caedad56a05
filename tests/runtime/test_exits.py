"""Exits at run time: what a hand-made stack of layers gives with and without skipping."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.runtime import exits
from effc.runtime.cache import Cache, Step, cache_shapes, empty_cache
from effc.runtime.layers import attention, linear, norm

L, D, V, AT = 6, 16, 32, (2, 4)


def _arrays(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    layers = [{"q": matrix(D, D), "k": matrix(D, D), "v": matrix(D, D), "o": matrix(D, D)} for _ in range(L)]
    return {"layers": layers, "exits": [{"w": matrix(D, D)} for _ in AT], "embed": matrix(V, D), "score": matrix(D, 1)}


def _heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], 2, D // 2)


def _keep(p: Any, x: jax.Array, step: Step) -> tuple[jax.Array, ...]:
    n = norm(x, kind="rms", eps=1e-5)
    return step.append(_heads(linear(n, p["k"])), _heads(linear(n, p["v"])))


def _run(p: Any, x: jax.Array, step: Step) -> jax.Array:
    keys, values = _keep(p, x, step)
    q = _heads(linear(norm(x, kind="rms", eps=1e-5), p["q"]))
    return x + linear(attention(q, keys, values, step.positions, scale=0.3).reshape(x.shape), p["o"])


def _extend(params: Any, tokens: jax.Array, cache: Cache | None = None, threshold: Any = 1.0, **options: Any) -> Any:
    step = Step(tokens, cache)
    x = params["embed"][tokens] * 3

    def leave(p: Any, x: jax.Array) -> Any:
        out = x + linear(norm(x, kind="rms", eps=1e-5), p["w"]) * 0.1
        return (out, linear(x, params["score"])) if options.get("measure") == "classifier" else out

    def head(x: jax.Array) -> jax.Array:
        return linear(norm(x, kind="rms", eps=1e-5) * 2, params["embed"], layout="nk")

    stack = exits.Stack(params["layers"], params["exits"], _run, _keep, leave, head)
    logits, layers = exits.early(step, x, stack, at=AT, threshold=threshold, **options)
    return logits, layers, step.cache()


def _full(params: Any, tokens: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
    step, x = Step(tokens, cache), params["embed"][tokens] * 3
    for p in params["layers"]:
        x = _run(p, x, step)
    return linear(norm(x, kind="rms", eps=1e-5) * 2, params["embed"], layout="nk"), step.cache()


def _stepwise(params: Any, tokens: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array, Cache]:
    """One token at a time over a cache: skipped layers do not run."""
    shapes = cache_shapes(lambda p, x: (None, _extend(p, x)[2]), params, tokens.shape[0])
    cache, logits, layers = empty_cache(shapes, 16), [], []
    call = jax.jit(partial(_extend, **options))
    for t in range(tokens.shape[1]):
        out, ran, cache = call(params, tokens[:, t : t + 1], cache)
        logits.append(out)
        layers.append(ran)
    return jnp.concatenate(logits, 1), jnp.concatenate(layers, 1), cache


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, V, (3, 8)), jnp.int32)
MEASURES = ["softmax", "softmax_max", "state", "classifier"]


def _middle(params: Any, **options: Any) -> float:
    """A threshold at which some leave and some do not."""
    call, tried = jax.jit(partial(_extend, **options)), np.linspace(0.01, 0.99, 30)
    found = np.array([call(params, TOKENS, threshold=t)[1].mean() for t in tried])
    return float(tried[np.argmin(abs(found - 4))])


@pytest.mark.parametrize("measure", MEASURES)
def test_one_is_the_full_model_bit_for_bit_and_zero_is_the_first_exit(measure):
    params = _arrays()
    full, cache = jax.jit(_full)(params, TOKENS)
    logits, layers, kept = jax.jit(partial(_extend, threshold=1.0, measure=measure))(params, TOKENS)
    assert (logits == full).all() and (layers == L).all()
    for mine, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(cache), strict=True):
        assert (mine == theirs).all()
    assert (_extend(params, TOKENS, threshold=0.0, measure=measure)[1] == AT[0]).all()


EVERY = [(measure, rows) for measure in MEASURES for rows in ("masked", "wait")]
SAMPLE = {("softmax", "masked"), ("state", "wait")}


@pytest.mark.parametrize(
    ("measure", "rows"), [pytest.param(*p, marks=() if p in SAMPLE else pytest.mark.slow) for p in EVERY]
)
def test_skipping_gives_what_masking_gives(measure, rows):
    params = _arrays()
    options = {"measure": measure, "rows": rows}
    options["threshold"] = _middle(params, **options)
    masked, layers, cache = jax.jit(partial(_extend, **options))(params, TOKENS)
    stepped, ran, grown = _stepwise(params, TOKENS, **options)
    assert (ran == layers).all() and len(np.unique(np.asarray(ran))) > 1
    np.testing.assert_allclose(stepped, masked, atol=2e-5)
    for whole, row in zip(cache.entries, grown.entries, strict=True):
        for a, b in zip(whole.all(), row.all(), strict=True):
            np.testing.assert_allclose(b[:, : a.shape[1]], a, atol=2e-5)


def test_a_batch_with_masked_rows_is_its_rows_one_by_one():
    params = _arrays()
    threshold = _middle(params)
    together = _stepwise(params, TOKENS, threshold=threshold)
    for row in range(TOKENS.shape[0]):
        alone = _stepwise(params, TOKENS[row : row + 1], threshold=threshold)
        assert (alone[1][0] == together[1][row]).all()
        np.testing.assert_allclose(alone[0][0], together[0][row], atol=2e-5)


def test_rows_that_wait_leave_together_and_later():
    params = _arrays()
    threshold = _middle(params, rows="wait")
    waiting = jax.jit(partial(_extend, rows="wait"))(params, TOKENS, threshold=threshold)[1]
    alone = jax.jit(_extend)(params, TOKENS, threshold=threshold)[1]
    assert (waiting == waiting[:1]).all()
    first = _stepwise(params, TOKENS[:, :1], threshold=threshold)[1]
    assert (waiting[:, :1] >= first).all() and waiting.sum() >= alone.sum() - L


def test_skipped_layers_keep_keys_and_values_of_the_state_that_left():
    params = _arrays()
    cache = _stepwise(params, TOKENS[:1, :1], threshold=0.0)[2]
    step, x = Step(TOKENS[:1, :1]), params["embed"][TOKENS[:1, :1]] * 3
    for p in params["layers"][: AT[0]]:
        x = _run(p, x, step)
    for p in params["layers"][AT[0] :]:
        _keep(p, x, step)
    for mine, wanted in zip(cache.entries, step.cache().entries, strict=True):
        for a, b in zip(mine.all(), wanted.all(), strict=True):
            np.testing.assert_allclose(a[:, :1], b, atol=1e-6)
    # The second token attends to them: other rows there, other logits.
    after = _extend(params, TOKENS[:1, 1:2], cache, threshold=1.0)[0]
    full = _full(params, TOKENS[:1, :2])[0][:, 1:]
    assert float(abs(after - full).max()) > 1e-3


def test_no_cache_is_copied():
    params = _arrays()
    shapes = cache_shapes(lambda p, x: (None, _extend(p, x)[2]), params, 1)
    cache = empty_cache(shapes, 64)
    call = jax.jit(partial(_extend, threshold=0.5), donate_argnums=2)
    text = call.lower(params, TOKENS[:1, :1], cache).compile().as_text() or ""
    whole = "f32[2,64,8]"
    assert whole in text
    assert not [line for line in text.splitlines() if f"= {whole}" in line and " copy(" in line]


def test_what_a_tpu_is_given_skips_too():
    """Two loops a segment, one for the layers and one for what they keep; no layer outside of them but the first."""
    params = _arrays()
    shapes = cache_shapes(lambda p, x: (None, _extend(p, x)[2]), params, 1)
    lowered = jax.jit(_extend).trace(params, TOKENS[:1, :1], empty_cache(shapes, 16)).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("stablehlo.while") == 2 * len(AT)


def test_layers_run_is_no_less_where_the_threshold_is_higher():
    params = _arrays()
    shapes = cache_shapes(lambda p, x: (None, _extend(p, x)[2]), params, 3)
    call = jax.jit(_extend)
    ran = [call(params, TOKENS[:, :1], empty_cache(shapes, 16), threshold=t)[1] for t in np.linspace(0, 1, 12)]
    assert (np.diff(np.stack(ran).astype(int), axis=0) >= 0).all()


def test_measures_lie_in_zero_to_one_and_are_what_they_say():
    logits = jnp.asarray([[3.0, 1.0, 0.0], [50.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    p = np.sort(np.asarray(jax.nn.softmax(logits)))
    np.testing.assert_allclose(exits.margin(logits), p[:, -1] - p[:, -2], atol=1e-6)
    np.testing.assert_allclose(exits.likeliest(logits), p[:, -1], rtol=1e-6)
    x = jnp.asarray([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    y = jnp.asarray([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(exits.similarity(x, y), [1, 0.5**0.5, 0], atol=1e-6)


def test_decay_in_the_paper_and_in_t5x():
    progress = jnp.asarray([0.0, 0.5, 1.0])
    falling = np.exp(-4 * np.asarray(progress))
    np.testing.assert_allclose(exits.decayed(0.8, progress, "none"), 0.8)
    np.testing.assert_allclose(exits.decayed(0.8, progress, "paper"), 0.72 + 0.1 * falling, rtol=1e-6)
    np.testing.assert_allclose(exits.decayed(0.8, progress, "t5x"), 0.8 * (0.9 + 0.1 * falling), rtol=1e-6)
    for form in ("none", "paper", "t5x"):
        assert (exits.decayed(1.0, progress, form) == 1).all()
