"""The real TPU compiler takes the kernels of caches, attention and acceptance, with the shapes of known models."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

SHAPES = {
    "smollm2-135m": (9, 3, 64, 49152, 0),
    "llama-3-8b": (32, 8, 128, 128256, 0),
    "gemma-3-4b": (8, 4, 256, 262208, 1024),
}
"""Heads, heads of keys and values, their width, tokens, window."""

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from effc.runtime import layers
from effc.runtime.cache import Cache, Rows, Step
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.acceptance import tpu

def compiled(target, h, g, d, vocab, window, batch, tokens):
    devices = topologies.get_topology_desc(target, platform="tpu").devices
    there = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    def array(shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=there)
    def attend(q, k, v, cache):
        step = Step(jnp.zeros((batch, tokens), jnp.int32), cache)
        keys, values = step.append(k, v, cache="i8")
        return layers.attention(q, keys, values, step.positions, window=window), step.cache()
    with on_tpu.traced(target.partition(":")[0]) as calls:
        rows = jax.eval_shape(lambda: Rows.of([jnp.zeros((batch, 1, g, d))] * 2, "i8").empty(2048))
        cache = jax.tree.map(lambda x: array(x.shape, x.dtype), Cache(jnp.zeros(batch, jnp.int32), (rows,)))
        own = (array((batch, tokens, n, d)) for n in (h, g, g))
        text = jax.jit(attend, donate_argnums=3).lower(*own, cache).compile().as_text()
        scores = array((batch, vocab))
        text += jax.jit(tpu.draw).lower(scores, scores, array((batch, 2), "uint32")).compile().as_text()
    for call in calls:
        assert f"%{call.name}" in text, call.name
    codes = f"s8[{batch * g},2048,{max(d, 128)}]"
    copies = [line for line in text.splitlines() if f"= {codes}" in line and " copy(" in line]
    assert not copies, copies
    print(*(call.name for call in calls))

for case in eval(sys.argv[1]):
    compiled(*case)
"""

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false",
}  # fmt: skip


EVERY = [(*SHAPES[name], *call) for name in SHAPES for call in ((1, 1), (8, 4))]
SOME = [(*SHAPES[name], *call) for name, call in zip(SHAPES, ((1, 1), (8, 4), (1, 1)))]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("shapes", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)])
def test_kernels_compile_and_caches_are_not_copied(shapes: list[tuple[int, ...]]) -> None:
    """Decoding and verification; all in one process, since loading the compiler takes long."""
    cases = [(target, *shape) for target in TARGETS for shape in shapes]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, repr(cases)], env={**os.environ, **ENVIRONMENT}, timeout=500, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(cases) and "attention_int8_window_g4" in done.stdout
