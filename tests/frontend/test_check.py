"""What the check after lowering accepts of half precision, and what not; where ops say they come from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effc
from effc.errors import EffcError
from effc.frontend import lower
from effc.frontend.check import alike, check
from effc.frontend.import_jaxpr import import_traces
from effc.frontend.trace import trace

WIDTH = 32


def near(x: np.ndarray, error: float, seed: int) -> np.ndarray:
    return x + np.random.default_rng(seed).normal(size=x.shape, scale=error * np.abs(x).max())


def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 24, 61))


@pytest.mark.parametrize("error", [1e-3, 0.05])
def test_as_far_as_the_model_by_rounding(error: float) -> None:
    alike(near(logits(), error, 1), near(logits(), error, 2), logits(), "here")


def test_one_position_that_is_much_farther_is_refused() -> None:
    wanted, made = near(logits(), 5e-3, 1), near(logits(), 5e-3, 2)
    made[2, 7] = near(logits(), 0.1, 3)[2, 7]
    with pytest.raises(EffcError, match="most at sequence 2, position 7"):
        alike(made, wanted, logits(), "here")
    with pytest.raises(EffcError, match="want them alike"):  # the module in f32 is another function than the model
        alike(wanted, made, logits(), "here")


def deep(params: Any, tokens: jax.Array) -> jax.Array:
    """Rounding adds up over layers of large values."""
    x = params["embed"][tokens]
    seen = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    for _ in range(4):
        scores = jnp.einsum("bqd,bkd->bqk", x @ params["q"], x).astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(seen[None], scores, -1e9)).astype(jnp.bfloat16)
        x = x + jax.nn.gelu(weights @ x @ params["w"])
    return (x @ params["embed"].T).astype(jnp.float32)


def test_half_precision_is_judged_from_the_exact_result() -> None:
    rng = np.random.default_rng(0)
    shapes = {"embed": (61, WIDTH), "q": (WIDTH, WIDTH), "w": (WIDTH, WIDTH)}
    params = {n: np.asarray(jnp.asarray(rng.normal(size=s, scale=0.4), jnp.bfloat16)) for n, s in shapes.items()}
    source = effc.load(deep, params, name="half", context=40)
    lines = check(lower(source), source)
    assert all("by rounding, the model's by" in line for line in lines)


def test_ops_of_library_functions_come_from_the_line_that_calls_them() -> None:
    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        first = jnp.where(x > 0, x, 0.0)
        again = jnp.where(x < 0, x, 0.0)
        return jax.nn.softmax(first - again)

    spec = {"embed": jax.ShapeDtypeStruct((61, WIDTH), jnp.float32)}
    ops = import_traces(trace(forward, spec)).order()
    places = [op.loc for op in ops if op.kind not in ("param", "const")]
    assert all(place and place.file.endswith("test_check.py") and place.line for place in places)
    selects = [op.loc.line for op in ops if op.kind == "lax.select_n" and op.loc and "_where" not in op.loc.file]
    assert len(set(selects)) == len(selects)
