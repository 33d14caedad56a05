"""What programs get of native regions: whole decode steps in one call, or XLA alone where that is wanted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.runtime import layers
from effc.runtime.cache import Cache, Step
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.kernels import policy
from effc.runtime.kernels.build import Unbuilt
from effc.runtime.kernels.region import native
from effc.runtime.kernels.region.bandwidth import bandwidth
from effc.runtime.packed import Packed
from effc.runtime.program import Program
from effc.runtime.qarray import QArray

try:
    native.target(())
except Unbuilt as unbuilt:
    pytest.skip(f"native kernels: {unbuilt}", allow_module_level=True)

WIDTH, VOCAB = 64, 96


def table(seed: int, *shape: int, axis: int = -2) -> QArray:
    rng = np.random.default_rng(seed)
    grouped = [*shape]
    grouped[axis] = shape[axis] // 32
    codes = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    return QArray(codes, jnp.asarray(rng.uniform(0.0005, 0.001, grouped), jnp.float16), None, 8, 32, axis, shape[-1])


def params() -> dict[str, Any]:
    names = {"q": (WIDTH, WIDTH), "k": (WIDTH, 32), "v": (WIDTH, 32), "o": (WIDTH, WIDTH), "up": (WIDTH, 96)}
    names["down"] = (96, WIDTH)
    layers_ = [{name: table(10 * i + j, *shape) for j, (name, shape) in enumerate(names.items())} for i in (1, 2, 3)]
    return {"embed": table(0, VOCAB, WIDTH, axis=-1), "layers": layers_}


def layer(p: dict[str, Any], x: jax.Array, step: Step) -> jax.Array:
    b, t, _ = x.shape
    h = layers.norm(x, kind="rms", eps=1e-5)
    q, k, v = (layers.linear(h, p[name]).reshape(b, t, -1, 16) for name in "qkv")
    cos, sin = layers.rope_table(step.positions, dims=16, theta=1000.0)
    keys, values = step.append(layers.rope(k, cos, sin), v)
    a = layers.attention(layers.rope(q, cos, sin), keys, values, step.positions, scale=0.25)
    x = x + layers.linear(a.reshape(b, t, -1), p["o"])
    h = layers.norm(x, kind="rms", eps=1e-5)
    return x + layers.linear(layers.silu(layers.linear(h, p["up"])), p["down"])


def extend(p: Any, tokens: jax.Array, cache: Cache | None = None, valid: jax.Array | None = None) -> Any:
    step = Step(tokens, cache, valid)
    x = layers.embed(tokens, p["embed"])
    for each in p["layers"]:
        x = layer(each, x, step)
    x = layers.norm(step.last(x), kind="rms", eps=1e-5)
    return layers.linear(x, p["embed"], layout="nk"), step.cache()


PROMPTS = [[1, 2, 3, 4, 5], [7] * 20, [90]]


def written(engine: Engine) -> list[list[int]]:
    return generate(engine, PROMPTS, max_new_tokens=12, stop_ids=(), chunk=4).tokens


def test_a_token_is_one_call() -> None:
    engine = Engine(Program(extend, {}, 64), params())
    assert all(isinstance(w, Packed) for w in engine.params["layers"][0].values())
    native_tokens = written(engine)
    texts = [compiled.as_text() for key, compiled in engine._compiled.items() if key[0][0] == "decode"]  # pyright: ignore
    assert [text.count('custom_call_target="effc_region') for text in texts] == [1]
    alone = [generate(engine, [prompt], max_new_tokens=12, stop_ids=()).tokens[0] for prompt in PROMPTS]
    assert native_tokens == alone, "rows do not depend on each other"


def test_the_same_tokens_as_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = written(Engine(Program(extend, {}, 64), params()))
    monkeypatch.setenv("EFFC_NATIVE", "0")
    engine = Engine(Program(extend, {}, 64), params())
    assert not any(isinstance(w, Packed) for w in engine.params["layers"][0].values())
    assert written(engine) == ours


def test_threads_do_not_change_results() -> None:
    engine = Engine(Program(extend, {}, 64), params())
    tokens = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
    first, _ = engine.extend(tokens, engine.empty(1, 8))
    for _ in range(20):
        again, _ = engine.extend(tokens, engine.empty(1, 8))
        np.testing.assert_array_equal(first, again)


def test_a_thread_that_slept_helps_as_one_that_is_awake_does() -> None:
    engine = Engine(Program(extend, {}, 64), params())
    tokens, cache = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32), engine.empty(1, 8)
    run = jax.jit(native.regions(extend))
    want, _ = run(engine.params, tokens, cache)
    for pause in (0.0, 0.0001, 0.01) * 10:
        time.sleep(pause)
        np.testing.assert_array_equal(run(engine.params, tokens, cache)[0], want)


def test_variants_in_one_process_have_threads_of_their_own() -> None:
    engine = Engine(Program(extend, {}, 64), params())
    args = engine.params, jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32), engine.empty(1, 8)
    calls = [jax.jit(native.regions(extend, flags)) for flags in native.VARIANTS.values()]
    wanted = [call(*args)[0] for call in calls]
    for _ in range(20):
        for call, want in zip(calls, wanted, strict=True):
            np.testing.assert_array_equal(call(*args)[0], want)


def test_many_programs_at_once_all_end() -> None:
    """More callers than processors, each with the whole pool's help: nobody waits for a thread that never comes."""
    engine = Engine(Program(extend, {}, 64), params())
    tokens, cache = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32), engine.empty(1, 8)
    run = jax.jit(native.regions(extend))
    want, _ = run(engine.params, tokens, cache)

    def call(_: int) -> bool:
        return all(np.array_equal(run(engine.params, tokens, cache)[0], want) for _ in range(10))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(call, range(6), timeout=120))


def test_portable_programs_have_none() -> None:
    with policy.portable():
        assert not native.usable()
        assert native.packed(params())["layers"][0]["q"].shape == (WIDTH, WIDTH)
        assert isinstance(native.packed(params())["layers"][0]["q"], QArray)


def test_status_tells_what_is_used_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "activations of 16 bits" in native.status()
    monkeypatch.setenv("EFFC_ACTIVATIONS", "8")
    assert "activations of 8 bits" in native.status()
    monkeypatch.setenv("EFFC_NATIVE", "portable")
    assert native.status().startswith("plain C++ (EFFC_NATIVE=portable)")
    monkeypatch.setenv("EFFC_NATIVE", "0")
    assert native.status() == "off (EFFC_NATIVE=0)"


def test_without_a_compiler_it_says_so_once() -> None:
    script = "from effc.runtime.kernels.region import native\nprint(native.usable(), native.usable(), native.status())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "CXX": "no-such-compiler"}, capture_output=True, text=True
    )
    assert done.stdout.startswith("False False not built: no C++ compiler")
    assert done.stderr.count("effc: products run through XLA, slower") == 1


def test_bandwidth_is_that_of_memory() -> None:
    speed = bandwidth(1 << 20, repeats=1)
    assert speed is not None and 1e8 < speed < 1e13
