"""Modules that want more than tokens: what each argument is given, by name, in Python and on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from safetensors.numpy import save_file

import effc
from effc.cli.arguments import model_options
from effc.errors import EffcError
from effc.frontend import lower
from effc.frontend.checkpoints import open_checkpoint
from effc.frontend.source import flatten, load_all

VOCAB, WIDTH = 31, 16

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 6)), jnp.int32)


class Model(nn.Module):
    """The tokens come last; `seen` is a mask that somebody must make; `where` are positions under another name."""

    @nn.compact
    def __call__(self, seen, where, ids):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(ids) + nn.Embed(40, WIDTH, name="places")(where)
        scores = jnp.einsum("bqd,bkd->bqk", nn.Dense(WIDTH, name="q")(x), x)
        x = x + nn.softmax(jnp.where(seen, scores, -1e9)) @ x
        return nn.Dense(VOCAB, name="head")(x)


INPUTS = "ids=tokens,seen=causal,where=positions"


def variables() -> Any:
    b, t = TOKENS.shape
    seen = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
    where = jnp.broadcast_to(jnp.arange(t), (b, t))
    return Model().init(jax.random.key(0), seen, where, TOKENS), seen, where


def build() -> nn.Module:
    return Model()


def wanted() -> Any:
    params, seen, where = variables()
    return Model().apply(params, seen, where, TOKENS)


@pytest.mark.parametrize(
    "inputs", [INPUTS, {"ids": "tokens", "seen": "causal", "where": lambda ids: jnp.cumsum(jnp.ones_like(ids), 1) - 1}]
)
def test_in_python(inputs: Any) -> None:
    source = effc.load(Model(), variables()[0], inputs=inputs, context=40)
    np.testing.assert_allclose(source.forward(load_all(source), TOKENS), wanted(), atol=1e-5)
    kinds = [op.kind for op in lower(source).module.forward().ops]
    assert "attention" in kinds and "window" not in kinds


def test_of_a_checkpoint_on_the_command_line(tmp_path: Path) -> None:
    save_file(
        {k.replace("/", "."): np.asarray(v) for k, v in flatten(variables()[0]["params"]).items()},
        tmp_path / "w.safetensors",
    )
    parser = argparse.ArgumentParser()
    model_options(parser)
    for words in (
        ["--module", f"{__file__}:build", "--inputs", INPUTS],
        ["--inputs", INPUTS, "--module", f"{__file__}:build"],
    ):
        source = open_checkpoint(tmp_path / "w.safetensors", module=parser.parse_args(words).module)
        np.testing.assert_allclose(source.forward(load_all(source), TOKENS), wanted(), atol=1e-5)


class Masked(nnx.Module):
    """The mask may be None, and then hides nothing: left to its default, the model is no language model."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.head = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids, mask=None):
        x = self.embed(ids)
        scores = jnp.einsum("bqd,bkd->bqk", x, x)
        return self.head(nnx.softmax(scores if mask is None else jnp.where(mask, scores, -1e9)) @ x)


def test_an_argument_with_a_default_can_be_given() -> None:
    model = Masked(nnx.Rngs(0))
    kinds = [op.kind for op in lower(effc.load(model, inputs={"mask": "causal"})).module.forward().ops]
    assert "attention" in kinds
    with pytest.raises(EffcError, match="not causal"):
        lower(effc.load(model))


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ("", "wants argument 'where', which effc cannot fill; say what it is with --inputs where="),
        ("idz=tokens", "has no argument 'idz'; did you mean 'ids'"),
        ("ids=token", "inputs ids=token, want tokens or .*did you mean 'tokens'"),
        ("ids", "inputs 'ids', want ARGUMENT=ROLE"),
        ("seen=causal,where=positions", "inputs give 'seen' something else, want one argument to be tokens"),
    ],
)
def test_what_is_wrong_is_said(inputs: str, why: str) -> None:
    with pytest.raises(EffcError, match=why):
        effc.load(Model(), variables()[0], inputs=inputs)


def test_inputs_need_a_module(tmp_path: Path) -> None:
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(EffcError, match=r"want --module FILE\.py:FUNCTION too"):
        open_checkpoint(tmp_path / "w.safetensors", module="(ids=tokens)")
