"""Compiled by the real TPU compiler, layers past an exit stand in loops of at most one turn, and nowhere else; and
logits of tokens that are asked for alone nowhere at all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from effc.runtime import exits, layers
from effc.runtime.cache import Cache, Rows, Step
from effc.runtime.deferred import Waiting
from effc.runtime.kernels import on_tpu

D, TARGET, WAITING = 128, "v5e:2x2", int(sys.argv[1])
INNER = (256, 384, 512)  # of the layers: so each is known by its shape

def keep(p, x, step):
    heads = x.reshape(*x.shape[:2], 1, D)
    return step.append(heads, heads * 2)

def run(p, x, step):
    keys, values = keep(p, x, step)
    x = x + layers.attention(x.reshape(*x.shape[:2], 1, D), keys, values, step.positions).reshape(x.shape)
    return x + jax.nn.silu(x @ p[0]) @ p[1]

def extend(params, tokens, cache, threshold):
    step, table = Step(tokens, cache), params["table"]
    def best(x):
        return layers.top(x, table, layout="nk")
    head = lambda x: x @ table.T
    stack = exits.Stack(params["layers"], params["exits"], run, keep, lambda p, x: x @ p, head, best)
    how = {"threshold": threshold, "waiting": WAITING, "likeliest": True}
    token, ran = exits.early(step, table[tokens], stack, at=(1,) if WAITING else (1, 2), **how)
    return token, ran, step.cache()

devices = topologies.get_topology_desc(TARGET, platform="tpu").devices
there = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=there)
params = {
    "table": array(1024, D), "layers": [(array(D, n), array(n, D)) for n in INNER], "exits": [array(D, D)] * 2,
}
with on_tpu.traced("v5e"):
    rows = jax.eval_shape(lambda: Rows.of([jnp.zeros((1, 1, 1, D))] * 2, "float").empty(256))
    entries = [rows] * 3
    if WAITING:
        entries.append(jax.eval_shape(lambda: Waiting.none([jnp.zeros((1, 1, D))], WAITING)))
    cache = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), Cache(jnp.zeros(1, jnp.int32), tuple(entries)))
    lowered = jax.jit(extend, donate_argnums=2).lower(params, array(1, 1, dtype="int32"), cache, array())
    text = lowered.compile().as_text()
assert "while(" in text[text.index("ENTRY"):]
assert "%vocabulary_float32_nk_128x1024_m1" in text and "f32[1,1024]" not in text and "f32[1,1,1024]" not in text
for n, skipped in zip(INNER, (False, True, True)):
    products = [line for line in text.splitlines() if f"f32[{D},{n}]" in line and "dot_general" in line]
    print(n, len(products), skipped)
    assert products and all(("/while/body/" in line) == skipped for line in products), products
"""

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false",
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("waiting", [0, 2])
def test_layers_past_an_exit_run_in_loops_alone(waiting: int) -> None:
    """Kept by what the exit's state gives, and deferred."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(waiting)], env={**os.environ, **ENVIRONMENT}, timeout=500, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 3
