"""`effc.load` from memory, and the names of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import effc
from effc.frontend.source import load_all


class Bigram(nnx.Module):
    """Logits of the next token from this one alone."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.embed.attend(x)


TOKENS = jnp.asarray([[1, 2, 3, 4, 5, 6, 7, 8]], jnp.int32)


def test_load_an_nnx_module() -> None:
    model = Bigram(nnx.Rngs(0))
    source = effc.load(model, name="bigram", context=32)
    np.testing.assert_array_equal(source.forward(load_all(source), TOKENS), model(TOKENS))
    assert source.meta["vocab"] == 16 and source.context == 32


def test_load_a_function() -> None:
    params = {"table": jnp.arange(32.0).reshape(8, 4), "head": {"w": jnp.ones((4, 8))}}

    def forward(params, tokens):
        return params["table"][tokens] @ params["head"]["w"]

    source = effc.load(forward, params)
    assert set(source.weights.names()) == {"table", "head/w"}
    assert source.weights.spec("head/w").shape == (4, 8)
    np.testing.assert_array_equal(source.forward(load_all(source), TOKENS % 8), forward(params, TOKENS % 8))


def test_load_without_parameters() -> None:
    with pytest.raises(effc.EffcError, match=r"model: no parameters, want load\(model, params\)"):
        effc.load(lambda params, tokens: jax.nn.one_hot(tokens, 8))


def test_a_tokenizer_too_large_for_the_model(checkpoint: Path) -> None:
    with pytest.raises(effc.EffcError, match="the tokenizer has 4096 tokens, the model 16 embedding rows"):
        effc.load(Bigram(nnx.Rngs(0)), tokenizer=checkpoint / "tokenizer.json")


def test_unknown_name_and_the_nearest() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'; did you mean 'optimize'"):
        effc.optimise  # type: ignore[attr-defined]  # noqa: B018


def test_every_public_name_is_there() -> None:
    assert set(effc.__all__) <= set(dir(effc))
    for name in effc.__all__:
        assert getattr(effc, name) is not None


def test_import_is_quick() -> None:
    code = "import sys, effc; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
