"""Programs with early exits asked for tokens alone: on TPUs a kernel finds them, and no logits are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit
from effc.backend.to_stablehlo import export_programs, load_exported
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.verify import verify
from effc.passes.calm import Calm
from effc.passes.context import Model
from effc.passes.runner import step
from effc.runtime.cache import Cache, cache_shapes, empty_cache
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.vocabulary import tpu
from effc.runtime.leaving import exits_of, likeliest
from effc.runtime.sampling import Sampling
from effc.weights import Store

TINY = (Path(__file__).parent / "tiny.effc").read_text().replace("2 * f32", "6 * f32").replace("times=2", "times=6")
LOGITS = "%logits: f32[b,t,160] = linear(%n) [w=@embed] {layout=nk}"
CAPPED = TINY.replace(
    LOGITS, LOGITS.replace("%logits", "%all") + "\n    %logits: f32[b,t,160] = softcap(%all) {cap=2.0}"
)
BIASED = TINY.replace("param @norm", 'param @bias: f32[160] = "bias"\n  param @norm')
BIASED = BIASED.replace("[w=@embed] {layout=nk}", "[w=@embed, bias=@bias] {layout=nk}")
TOKENS = np.random.default_rng(0).integers(0, 160, (2, 6)).astype(np.int32)

Make = Callable[..., tuple[Module, Model]]


@pytest.fixture
def made(random_store: Callable[[Module], Store]) -> Make:
    """A module with exits, and its program with random arrays."""

    def call(text: str = TINY, **options: Any) -> tuple[Module, Model]:
        module = step(Calm(**options), parse(text)).after
        assert not list(verify(module))
        return module, Model.of(module, random_store(module))

    return call


@contextmanager
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[on_tpu.Call]]:
    """What is traced inside is for TPUs, and runs the vocabulary kernel in interpret mode; the rest is XLA's."""

    def taken(there: Callable[..., Any], default: Callable[..., Any], *arrays: Any) -> Any:
        mine = isinstance(there, partial) and there.func is tpu.top
        return there(*arrays, interpret=True) if mine else default(*arrays)

    with monkeypatch.context() as patch, on_tpu.traced() as calls:
        patch.setattr(on_tpu, "either", taken)
        yield calls


CASES = {
    "softmax": (TINY, {}), "softmax_max": (CAPPED, {"measure": "softmax_max"}), "capped": (CAPPED, {}),
    "classifier": (TINY, {"measure": "classifier"}), "biased": (BIASED, {}),
    "deferred": (TINY, {"first": 2, "state": "deferred", "waiting": 2}),
}  # fmt: skip
SLOW = ("softmax_max", "deferred", "biased")


def middle(call: Callable[..., Any], params: Any) -> tuple[float, jax.Array, jax.Array]:
    """A threshold at which some leave and some do not; the logits and layers there."""
    tried = {t: call(params, TOKENS, threshold=t)[:2] for t in np.geomspace(0.001, 0.9, 30).tolist()}
    best = min(tried, key=lambda t: abs(tried[t][1].mean() - 4))
    return best, *tried[best]


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def test_tokens_and_layers_are_those_of_the_logits(case: str, made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine, and by the kernel where the head ends in a product."""
    text, options = CASES[case]
    module, model = made(text, **options)
    entry = model.program.entries["early"]
    assert ("def best(" in emit(module)) == (text is not BIASED)
    threshold, logits, layers = middle(jax.jit(entry), model.params)
    assert 2 < layers.mean() < 6
    here = jax.jit(likeliest(entry))(model.params, TOKENS, None, threshold)
    with kernel(monkeypatch) as calls:
        there = jax.jit(likeliest(entry))(model.params, TOKENS, None, threshold)
    at = {"classifier": 1, "biased": 0, "deferred": 2}.get(case, 3)
    names = Counter(call.name for call in calls)
    assert names == Counter({"vocabulary_float32_nk_64x160_m12_c256" + "_capped" * (text is CAPPED): at})
    for tokens, ran, _ in (here, there):
        np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))
        np.testing.assert_array_equal(ran, layers)


def test_generation_for_tpus_is_generation_here(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy text asks for tokens alone; where tokens are drawn, or what was said counts, there are logits."""
    _, model = made()
    prompts = [row.tolist() for row in TOKENS]
    here = generate(Engine(model.program, model.params), prompts, max_new_tokens=5, exits=0.02)
    with kernel(monkeypatch) as calls:
        engine = Engine(model.program, model.params)
        there = generate(engine, prompts, max_new_tokens=5, exits=0.02)
        assert sum("vocabulary" in call.name for call in calls) >= 3
        calls.clear()
        generate(engine, prompts, max_new_tokens=2, exits=0.02, sampling=Sampling(repetition_penalty=1.2))
        assert not calls or not any("vocabulary" in call.name for call in calls)
    assert there.tokens == here.tokens and here.stats.exits is not None
    assert there.stats.exits == here.stats.exits and len(here.stats.exits.by_layers) > 1


@pytest.mark.parametrize(
    ("measure", "state"), [("softmax", "propagate"), ("softmax", "deferred"), ("classifier", "propagate")]
)
def test_lowered_for_a_tpu_no_logits_are_written(measure: str, state: str, made: Make) -> None:
    _, model = made(measure=measure, state=state, **({"first": 2} if state == "deferred" else {}))
    entry = model.program.entries["early"]

    def text(call: Callable[..., Any]) -> str:
        with on_tpu.traced():
            cache = empty_cache(cache_shapes(model.program.extend, model.params, 2), 128)
            given = (model.params, jnp.asarray(TOKENS[:, :1]), cache, jnp.float32(0.5))
            return jax.jit(lambda *args: call(*args)).trace(*given).lower(lowering_platforms=("tpu",)).as_text()

    def with_logits(params: Any, tokens: jax.Array, cache: Cache, threshold: jax.Array) -> Any:
        return entry(params, tokens, cache, threshold=threshold)

    written = re.compile(r"tensor<2x(1x)?160xf32>")
    assert written.search(text(with_logits))
    asked = text(likeliest(entry))
    assert 'kernel_name = "vocabulary_float32_nk_64x160_m2_c256"' in asked and not written.search(asked)


def test_programs_are_exported_with_their_exits(made: Make, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    _, model = made(first=2, state="deferred", waiting=2)
    programs = export_programs(model.program, model.params, tmp_path, batch=2, prompt=16, capacity=128)
    assert [(one.file, one.platforms) for one in programs][-1] == ("exits.bin", ("cpu", "tpu"))
    readme = (tmp_path / "README.md").read_text()
    assert (
        "(params, tokens, cache, threshold) -> (tokens, layers, cache)" in readme and "`threshold: float32[]`" in readme
    )
    leave, entry = load_exported(tmp_path / "exits.bin"), model.program.entries["early"]
    exits = exits_of(model.program)
    assert exits is not None
    cache = exits.with_waiting(model.params, empty_cache(cache_shapes(model.program.extend, model.params, 2), 128))
    want, layers, _ = jax.jit(entry)(model.params, TOKENS, threshold=0.02)
    for t in range(4):
        tokens, ran, cache = leave(model.params, TOKENS[:, t : t + 1], cache, np.float32(0.02))
        np.testing.assert_array_equal(tokens[:, 0], jnp.argmax(want[:, t], axis=-1))
        np.testing.assert_array_equal(ran[:, 0], layers[:, t])
