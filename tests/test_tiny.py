"""The whole product in one file: a model written here, compiled, served, and held against itself."""

from __future__ import annotations

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effc
from effc.backend.to_python import emit, load_program
from effc.generator import engine_of
from effc.ir.stream import run
from effc.runtime.generate import generate

VOCAB, WIDTH, CONTEXT = 48, 32, 64


class Block(nn.Module):
    """Pre-norm attention and MLP, as anybody might write them."""

    @nn.compact
    def __call__(self, x):
        length = x.shape[1]
        h = nn.RMSNorm()(x)
        q, k, v = (nn.DenseGeneral((2, 16), use_bias=False, name=n)(h) for n in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4
        seen = jnp.arange(length)[:, None] >= jnp.arange(length)[None]
        weights = nn.softmax(jnp.where(seen[None, None], scores, -1e30))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="o")(mixed)
        return x + nn.Dense(WIDTH)(nn.silu(nn.Dense(64)(nn.RMSNorm()(x))))


class Model(nn.Module):
    """Learned positions, so that their table limits the context."""

    @nn.compact
    def __call__(self, tokens):
        places = self.param("places", nn.initializers.normal(0.3), (CONTEXT, WIDTH))
        x = nn.Embed(VOCAB, WIDTH)(tokens) + places[None, : tokens.shape[1]]
        for _ in range(3):
            x = Block()(x)
        return nn.Dense(VOCAB, kernel_init=nn.initializers.normal(0.3))(nn.RMSNorm()(x))


@pytest.fixture(scope="module")
def model() -> tuple[Model, dict]:
    module = Model()
    return module, dict(module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (2, 24)).astype(np.int32)


def test_from_flax_to_a_served_artifact(model: tuple[Model, dict], tokens: np.ndarray, tmp_path: Path) -> None:
    module, params = model
    wanted = np.asarray(module.apply(params, tokens))

    # In: tracing gives IR that is text, and means the same.
    lowered = effc.lower(effc.load(module, params, name="tiny"))
    assert effc.parse(effc.dump(lowered.module)) == lowered.module
    assert lowered.module.meta["context"] == CONTEXT
    np.testing.assert_allclose(run(lowered.module, lowered.store, jnp.asarray(tokens)), wanted, atol=1e-4)

    # Out: an exact pipeline moves nothing, a lossy one says how much.
    exact = effc.optimize(effc.load(module, params), tmp_path / "f32", "clean,fuse", speed=False)
    coded = effc.optimize(effc.load(module, params), tmp_path / "q8", "quant8", speed=False)
    assert exact.exactness == "exact" and coded.exactness == "lossy"
    assert exact.after.quality and coded.after.quality
    assert (exact.after.quality.kl or 0) < 1e-6 < (coded.after.quality.kl or 0) < 1e-2
    assert coded.after.nbytes < 0.4 * coded.before.nbytes

    # The artifact stands alone: same logits, and what its program generates is what the model would say.
    opened = effc.open_model(tmp_path / "f32")
    engine = engine_of(opened)
    np.testing.assert_allclose(engine.forward(engine.params, jnp.asarray(tokens)), wanted, atol=1e-4)
    prompts = [tokens[0, :9].tolist(), tokens[1, :5].tolist()]
    made = generate(engine, prompts, max_new_tokens=12).tokens
    assert made == [greedy(module, params, prompt, 12) for prompt in prompts]

    # What was written is what is loaded, and what ships reads like a program.
    manifest = json.loads((tmp_path / "q8" / "manifest.json").read_text())
    assert manifest["pipeline"] == "quant8"
    source = (tmp_path / "f32" / "program.py").read_text()
    assert load_program(emit(opened.module)).context == CONTEXT
    assert "def extend(" in source and "effc.ir" not in source


def greedy(module: Model, params: dict, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens by the model itself, the whole text again for each."""
    text = np.zeros((1, len(prompt) + count), np.int32)
    text[0, : len(prompt)] = prompt
    forward = jax.jit(module.apply)
    for at in range(len(prompt), text.shape[1]):
        text[0, at] = int(forward(params, text)[0, at - 1].argmax())
    return text[0, len(prompt) :].tolist()
