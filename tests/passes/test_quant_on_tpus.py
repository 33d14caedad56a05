"""Quantized programs for TPUs: norms that products alone read are taken by their kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from effc.backend.to_python import emit
from effc.backend.to_stablehlo import exported_params
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.passes.context import Model
from effc.runtime.cache import cache_shapes, empty_cache
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.matmul import tpu
from effc.weights import Store

TINY = (Path(__file__).parent / "tiny.effc").read_text()
TOKENS = np.random.default_rng(0).integers(0, 160, (2, 3)).astype(np.int32)


def test_norms_that_products_read_are_theirs_to_take(
    apply: Callable[..., Any], random_store: Callable[[Module], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of q, k and v and of gate and up, in interpret mode; the last one too, where the head has codes."""
    before = parse(TINY)
    module, store, _ = apply(before, random_store(before), "quant4{group=32}")
    assert "normed(" not in emit(before)
    assert len(re.findall(r"^    \w+ = normed\(", emit(module), re.MULTILINE)) == 3
    model = Model.of(module, store)
    wanted, _ = jax.jit(model.program.extend)(model.params, TOKENS)

    def taken(there: Callable[..., Any], default: Callable[..., Any], *arrays: Any) -> Any:
        mine = isinstance(there, partial) and there.func is tpu.of_norm
        return there(*arrays, interpret=True) if mine else default(*arrays)

    monkeypatch.setattr(on_tpu, "either", taken)
    with on_tpu.traced() as calls:
        params = exported_params(model.params)
        cache = empty_cache(cache_shapes(model.program.extend, params, 2), 128)
        calls.clear()
        logits, _ = jax.jit(lambda *args: model.program.extend(*args))(params, TOKENS, cache)
    assert len(calls) == 2 * 5 + 1 and all(call.name.endswith("_normed") for call in calls)
    np.testing.assert_allclose(logits, wanted, atol=5e-3 * float(np.abs(wanted).max()))
