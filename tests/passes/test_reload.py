"""Every format written, read in a new process: the same logits to the bit, and as many bytes as types say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from effc.backend.to_python import emit, load_program
from effc.runtime.weights import load_params
from effc.weights import nbytes, write_safetensors

PIPELINES = {
    "int4": "quant4",
    "asym": "quant4{sym=false}",
    "nf4": "quant4{form=nf4,embed=4,head=4}",
    "mxfp4": "quant4{form=mxfp4}",
    "fp8": "quant8{form=fp8e4m3}",
    "wide": "quant8{form=fp8e5m2}",
    "mxfp8": "quant8{form=mxfp8}",
    "mix": "quant4{rules=*.q:2/16;*.k:3;*.v:5;*.o:6a;@embed:7/0}",
    "cache": "quant8,kv8",
    "acts": "quant4,act8,kv4",
}

CHILD = """
import sys, pathlib, numpy as np, jax.numpy as jnp
from effc.backend.to_python import load_program
from effc.runtime.weights import load_params
for folder in map(pathlib.Path, sys.argv[1:]):
    program = load_program((folder / "program.py").read_text())
    params = load_params(folder / "model.safetensors", program.params)
    np.save(folder / "logits.npy", program.forward(params, jnp.asarray(np.load(folder / "tokens.npy"))))
"""


def test_reload_is_equal_to_the_bit(tiny, random_store, apply, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 160, (1, 16)).astype(np.int32)
    folders, here = [tmp_path / name for name in PIPELINES], {}
    for folder, passes in zip(folders, PIPELINES.values(), strict=True):
        folder.mkdir()
        module, store, _ = apply(tiny, random_store(tiny), passes)
        (file,) = write_safetensors(folder / "model.safetensors", module, store)
        assert 0 <= file.stat().st_size - nbytes(module) < 4096  # the header
        assert nbytes(module) == sum(p.count * p.type.nbytes() for p in module.params.values())
        (folder / "program.py").write_text(emit(module))
        np.save(folder / "tokens.npy", tokens)
        program = load_program((folder / "program.py").read_text())
        here[folder] = program.forward(load_params(file, program.params), jnp.asarray(tokens))
    words = [sys.executable, "-c", CHILD, *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for folder, logits in here.items():
        np.testing.assert_array_equal(np.load(folder / "logits.npy"), logits, err_msg=folder.name)
    close = {folder.name: float(jnp.abs(logits - here[tmp_path / "int4"]).max()) for folder, logits in here.items()}
    assert all(gap > 0 for name, gap in close.items() if name != "int4")
