"""Side by side with qwix on the same matrices, bits and groups: rounding is the same, fitted weights are not worse."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.ir.types import Quant
from effc.passes.quant.gptq import gptq
from effc.passes.quant.scaling import awq, output_error
from effc.passes.quant.statistics import Seen
from effc.passes.quantizer import code, rounded, spread

qwix = pytest.importorskip("qwix")

K, N, GROUP = 64, 48, 32


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    """w[K,N]."""
    return np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)


@pytest.fixture(scope="module")
def seen() -> Seen:
    """Of inputs that are correlated and of which some channels are large."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, K)) @ (np.eye(K) + 0.4 * rng.standard_normal((K, K)) / K**0.5)
    x = (x * np.exp(rng.standard_normal(K))).astype(np.float32)
    return Seen(len(x), x.T @ x, np.abs(x).mean(0), np.abs(x).max(0))


def _how(bits: int) -> Any:
    """What qwix's cores take: codes of w[N,K], grouped along K."""
    qarray = importlib.import_module("qwix._src.core.qarray")
    return qarray.HowToQuantize(qtype=f"int{bits}", channelwise_axes=(0,), tiled_axes={1: GROUP})


@pytest.mark.parametrize(("bits", "group"), [(4, GROUP), (8, 0), (8, GROUP)])
def test_rounding_is_the_same(bits: int, group: int, matrix: np.ndarray) -> None:
    theirs = qwix.quantize(
        jnp.asarray(matrix), f"int{bits}", channelwise_axes=(1,), tiled_axes={0: group} if group else None
    )
    codes, scales, _ = code(matrix, Quant(bits, group), "absmax")
    np.testing.assert_allclose(scales[:, 0], np.asarray(theirs.scale).reshape(len(scales), N), rtol=1e-6)
    # Values half way between two codes (each group's extreme is) may go either way: the error is the same.
    off = np.abs(np.asarray(qwix.dequantize(theirs)) - matrix)
    np.testing.assert_allclose(np.abs(spread(codes, scales, 0 * scales, group) - matrix), off, atol=2e-6)
    assert np.sum(np.asarray(theirs.qvalue, np.int8) != codes) <= scales.size


def test_gptq_is_not_worse(matrix: np.ndarray, seen: Seen) -> None:
    core = importlib.import_module("qwix.contrib.gptq_core")
    with jax.numpy_rank_promotion("allow"):
        found, _ = core.quantize_weight(jnp.asarray(matrix.T), jnp.asarray(seen.square), _how(4))
    theirs = output_error(np.asarray(qwix.dequantize(found)).T - matrix, seen.square)
    same = spread(*gptq(matrix, seen.square, Quant(4, GROUP), "absmax"), GROUP)
    best = spread(*gptq(matrix, seen.square, Quant(4, GROUP), "mse"), GROUP)
    assert output_error(same - matrix, seen.square) < 1.1 * theirs  # scales from the rows as they are, not as they were
    assert output_error(best - matrix, seen.square) < 0.8 * theirs


def test_awq_is_not_worse(matrix: np.ndarray, seen: Seen) -> None:
    core, quant = importlib.import_module("qwix.contrib.awq_core"), Quant(4, GROUP)
    found = core.search_optimal_scales(jnp.asarray(matrix.T), jnp.asarray(seen.mean), _how(4))
    theirs = np.asarray(found, np.float32).reshape(K, 1)
    ours = awq(seen, [(matrix, lambda w, importance: rounded(w, quant, "mse", importance))], np.arange(K))[0]
    s = ours.astype(np.float32)[:, None]
    importance = np.diagonal(seen.square) / np.square(s[:, 0])
    wrong = [
        output_error(rounded(matrix * theirs, quant, "absmax") / theirs - matrix, seen.square),
        output_error(rounded(matrix * s, quant, "mse", importance) / s - matrix, seen.square),
    ]
    assert wrong[1] < wrong[0]
