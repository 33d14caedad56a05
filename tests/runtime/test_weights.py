"""Weights of a program: mapped without copies, refused by name when they are not what it wants."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from effc.errors import EffcError
from effc.runtime.qarray import QArray, pack
from effc.runtime.weights import load_params, open_tensors, parse_spec

TABLE = {
    "embed": "f32[6,16]",
    "head": "q4{group=4,scale=f16,axis=-1}[5,8]",
    "layers": {"q": "2 * q8{group=8,sym}[16,4]", "scale": "2 * bf16[32] = norm_scale"},
}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "embed": rng.standard_normal((6, 16)).astype(np.float32),
        "head.codes": pack(rng.integers(-8, 8, (5, 8)).astype(np.int8)),
        "head.scales": rng.uniform(0.5, 1, (5, 2)).astype(np.float16),
        "head.zeros": rng.uniform(-1, 1, (5, 2)).astype(np.float16),
        "layers.q.codes": rng.integers(-128, 128, (2, 16, 4)).astype(np.int8),
        "layers.q.scales": rng.uniform(0.5, 1, (2, 2, 4)).astype(np.float32),
        "norm_scale": np.asarray(jnp.asarray(rng.standard_normal((2, 32)), jnp.bfloat16)),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(arrays(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_tree_is_what_extend_takes(file: Path) -> None:
    params, want = load_params(file, TABLE), arrays()
    assert (params["embed"] == want["embed"]).all()
    assert len(params["layers"]) == 2
    assert (params["layers"][1]["scale"] == want["norm_scale"][1]).all()
    head, q = params["head"], params["layers"][1]["q"]
    assert isinstance(head, QArray) and (head.bits, head.group, head.axis, head.shape) == (4, 4, -1, (5, 8))
    assert isinstance(q, QArray) and q.sym and (q.codes == want["layers.q.codes"][1]).all()


def test_aligned_arrays_are_not_copied(file: Path) -> None:
    tensors = open_tensors(file)
    for name in ("embed",):
        address = tensors[name].ctypes.data
        assert (load_params(file, {name: TABLE[name]})[name].unsafe_buffer_pointer() == address) == (address % 64 == 0)


def test_shards_are_found_through_their_index(tmp_path: Path) -> None:
    parts = {"a": {}, "b": {}}
    for i, (name, array) in enumerate(arrays().items()):
        parts["ab"[i % 2]][name] = array
    for shard, tensors in parts.items():
        save_file(tensors, tmp_path / f"model-{shard}.safetensors")
    index = {"weight_map": {name: f"model-{shard}.safetensors" for shard, ts in parts.items() for name in ts}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    params = load_params(tmp_path / "model.safetensors", TABLE)
    assert (params["embed"] == arrays()["embed"]).all()


def test_a_truncated_file_is_named(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(EffcError, match=r"model\.safetensors: damaged, want a safetensors file \(truncated at"):
        load_params(file, TABLE)
    file.write_bytes(b"\x00\x01")
    with pytest.raises(EffcError, match="shorter than its header"):
        load_params(file, TABLE)
    file.unlink()
    with pytest.raises(EffcError, match="no such file"):
        load_params(file, TABLE)


def test_missing_and_wrong_tensors_are_named(file: Path) -> None:
    with pytest.raises(EffcError, match="no tensor 'embedd'; did you mean 'embed'"):
        load_params(file, {"embedd": "f32[6,16]"})
    with pytest.raises(EffcError, match=r"'embed' is float32\[6, 16\], want f16\[6, 16\]"):
        load_params(file, {"embed": "f16[6,16]"})


def test_a_spec_that_is_no_type_is_refused() -> None:
    with pytest.raises(EffcError, match="x: 'f32' is no parameter type"):
        parse_spec("x", "f32")
