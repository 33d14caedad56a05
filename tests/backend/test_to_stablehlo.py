"""Exported programs, read back and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_stablehlo import export_programs, load_exported
from effc.errors import EffcError

TINY = Path(__file__).parent.parent / "runtime" / "tiny.effc"


def test_prefill_and_decode_run_from_their_files(emitted: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    engine = emitted(TINY.read_text()).engine
    made = export_programs(engine.program, engine.params, tmp_path, prompt=16, capacity=128)
    assert [done.platforms for done in made] == [("cpu", "tpu")] * 2
    readme = (tmp_path / "README.md").read_text()
    assert "- `tokens: int32[1, 16]`" in readme and "- `valid: int32[1]`" in readme
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    want = engine.forward(engine.params, tokens)
    prefill, decode = (load_exported(tmp_path / done.file) for done in made)
    padded = jnp.pad(tokens[:, :9], ((0, 0), (0, 7)))
    logits, cache = prefill(engine.params, padded, engine.empty(1, 128), jnp.array([9]))
    np.testing.assert_allclose(logits[:, 0], want[:, 8], atol=1e-5)
    logits, cache = jax.jit(decode)(engine.params, tokens[:, 9:], cache)
    np.testing.assert_allclose(logits[:, 0], want[:, 9], atol=1e-5)
    assert cache.lengths.tolist() == [10]


def test_a_prompt_longer_than_the_cache_is_refused(emitted: Callable[[str], Any], tmp_path: Path) -> None:
    engine = emitted(TINY.read_text()).engine
    with pytest.raises(EffcError, match="a prompt of 300 tokens, want at most the cache's 128"):
        export_programs(engine.program, engine.params, tmp_path, prompt=300, capacity=128)
