"""Programs that mix tokens in other ways than attention: what becomes of each, and that nothing wrong is emitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import effc
from effc.errors import EffcError
from effc.frontend import lower
from effc.frontend.check import check
from effc.frontend.source import Source
from effc.ir.core import walk
from tests.conformance.checks import EXACT, Case, differ
from tests.conformance.models import Model

VOCAB, WIDTH, CONTEXT = 61, 32, 32

Mix = Callable[[Any, jax.Array], jax.Array]
"""Parameters and x[b,t,32] -> what is added to x."""


@pytest.fixture(autouse=True)
def usual_promotion() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def program(mix: Mix) -> Source:
    """Embedding, mix, an MLP, a head."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCAB, WIDTH), "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "conv": (4, WIDTH),
        "up": (WIDTH, 48), "down": (48, WIDTH), "head": (WIDTH, VOCAB),
    }  # fmt: skip
    params = {name: rng.normal(size=shape, scale=0.2).astype(np.float32) for name, shape in shapes.items()}

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        x = x + mix(params, x)
        x = x + jax.nn.silu(x @ params["up"]) @ params["down"]
        return x @ params["head"]

    return effc.load(forward, params, name="stress", context=CONTEXT)


def shift_by_pad(p: Any, x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1] @ p["v"]


def shift_by_roll(p: Any, x: jax.Array) -> jax.Array:
    """The first token gets zeros, not the last token's values."""
    first = jnp.arange(x.shape[1])[None, :, None] == 0
    return jnp.where(first, 0.0, jnp.roll(x, 1, axis=1)) @ p["v"]


def linear_attention(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jax.nn.elu(x @ p["q"]) + 1, jax.nn.elu(x @ p["k"]) + 1, x @ p["v"]
    state = jnp.cumsum(k[..., :, None] * v[..., None, :], axis=1)
    return jnp.einsum("btk,btkv->btv", q, state) / jnp.sum(q * jnp.cumsum(k, axis=1), -1, keepdims=True)


def scan_over_tokens(p: Any, x: jax.Array) -> jax.Array:
    def step(state: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(row @ p["k"] + state @ p["q"])
        return state, state

    _, out = lax.scan(step, jnp.zeros((x.shape[0], WIDTH)), x.swapaxes(0, 1))
    return out.swapaxes(0, 1)


def causal_conv(p: Any, x: jax.Array) -> jax.Array:
    kernel = p["conv"][:, None, :]
    return lax.conv_general_dilated(
        x, kernel, (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=WIDTH
    )


def attend(p: Any, x: jax.Array, seen: Any) -> jax.Array:
    scores = jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"]) / WIDTH**0.5
    return jax.nn.softmax(jnp.where(seen, scores, -1e9)) @ (x @ p["v"])


def captured_mask(p: Any, x: jax.Array) -> jax.Array:
    """The mask is an array of numpy, made when the program is traced."""
    return attend(p, x, np.tril(np.ones((x.shape[1], x.shape[1]), bool))[None])


def flat_mlp(p: Any, x: jax.Array) -> jax.Array:
    """Batch and tokens are one axis in the MLP."""
    b, t, d = x.shape
    mixed = attend(p, x, jnp.tril(jnp.ones((t, t), bool))[None])
    rows = (x + mixed).reshape(b * t, d)
    return mixed + (jax.nn.gelu(rows @ p["up"]) @ p["down"]).reshape(b, t, d)


def mean_of_all(p: Any, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.mean(x, axis=1, keepdims=True), x.shape) @ p["v"]


def sum_of_all(p: Any, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), x.shape) @ p["v"]


def mean_so_far(p: Any, x: jax.Array) -> jax.Array:
    count = 1 + jnp.arange(x.shape[1])[None, :, None]
    return jnp.cumsum(x, axis=1) / count @ p["v"]


def sorted_experts(p: Any, x: jax.Array) -> jax.Array:
    """One of two experts a token; tokens are sorted by expert and brought back."""
    b, t, d = x.shape
    rows = x.reshape(b * t, d)
    expert = jnp.argmax(rows @ p["head"][:, :2], -1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=2).astype(jnp.int32)
    made = lax.ragged_dot(rows[order], jnp.stack([p["q"], p["k"]]), sizes)
    return jnp.zeros_like(made).at[order].set(made).reshape(b, t, d)


def encoder(p: Any, x: jax.Array) -> jax.Array:
    return attend(p, x, jnp.ones((x.shape[1], x.shape[1]), bool)[None])


def outcome(source: Source) -> tuple[str, str]:
    """(window or raised, what is said of it), once the module has been held against the program."""
    lowered = lower(source)
    check(lowered, source)
    kinds = {op.kind for func in lowered.module.funcs.values() for op in walk(func)}
    return ("window" if "window" in kinds else "raised"), "; ".join(lowered.notes)


@pytest.mark.parametrize("mix", [flat_mlp], ids=lambda mix: mix.__name__)
def test_decodes_with_a_cache(mix: Mix) -> None:
    assert outcome(program(mix)) == ("raised", "")


WINDOWS = {
    shift_by_pad: "lax.pad", shift_by_roll: "lax.slice", linear_attention: "lax.cumsum", mean_so_far: "lax.cumsum",
    scan_over_tokens: "lax.scan", causal_conv: "lax.conv_general_dilated", sorted_experts: "lax.sort",
}  # fmt: skip


@pytest.mark.parametrize(("mix", "op"), WINDOWS.items(), ids=[mix.__name__ for mix in WINDOWS])
def test_recomputes_the_window_and_says_so(mix: Mix, op: str) -> None:
    how, said = outcome(program(mix))
    assert how == "window"
    assert f"'{op}' mixes tokens and has no incremental rule" in said
    assert "every step recomputes the whole window: cost grows with the length" in said


@pytest.mark.parametrize("mix", [flat_mlp, *WINDOWS], ids=lambda mix: mix.__name__)
def test_emitted_program(mix: Mix, tmp_path: Path) -> None:
    case = Case(Model("stress", lambda: program(mix), 1), tmp_path)
    tokens = jnp.asarray(case.tokens[:, :20] % VOCAB)
    assert differ(case.exactly(case.emitted[1], tokens), case.forward(case.params, tokens)) < EXACT


REFUSED = {
    captured_mask: "captures an array that changes with the call, .* want it computed from the tokens' shape",
    mean_of_all: r"test_stress\.py:\d+: a number depends on the length \(12.0 at 12 tokens, 16.0 at 16\)",
    sum_of_all: "not causal: changing token 12 moved earlier logits, want a causal model",
    encoder: "not causal: changing token 12 moved earlier logits, want a causal model",
}


@pytest.mark.parametrize(("mix", "why"), REFUSED.items(), ids=[mix.__name__ for mix in REFUSED])
def test_refused(mix: Mix, why: str) -> None:
    with pytest.raises(EffcError, match=why):
        outcome(program(mix))
