"""The weight store: what is written reads back, streamed, and damaged files are refused with a reason."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effc.errors import EffcError
from effc.ir.core import Module, Param
from effc.ir.types import Quant, Type
from effc.weights import (
    Lazy,
    Store,
    elements,
    nbytes,
    open_safetensors,
    parts,
    tensor_name,
    write_safetensors,
)

PARAMS = [
    Param("embed", Type("f32", (10, 6))),
    Param("layers.norm", Type("f32", (6,)), 3),
    Param("layers.q", Type(Quant(4, 2, True, "f16"), (6, 5)), 3),
    Param("layers.k", Type(Quant(8, 0, False, "f32", -1), (4, 6)), 3),
    Param("half", Type("bf16", (3, 3))),
    Param("small", Type("f16", (7,))),
    Param("mask", Type("bool", (2, 2))),
    Param("ids", Type("i32", ())),
]


@pytest.fixture
def module() -> Module:
    return Module("m", params={p.name: p for p in PARAMS})


@pytest.fixture
def store(module: Module) -> Store:
    return Store({p.name: Lazy(p, _reader(p)) for p in PARAMS})


def _reader(param: Param):
    def read(layer: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([*param.name.encode(), layer])
        return {
            suffix: rng.integers(0, 2 if part.dtype == bool else 100, part.shape).astype(part.dtype)
            for suffix, part in parts(param.type).items()
        }

    return read


def _same(one: Store, two: Store) -> None:
    for name, lazy in one.items():
        for layer in range(lazy.param.count):
            wanted, got = lazy.read(layer), two[name].read(layer)
            assert wanted.keys() == got.keys()
            for suffix in wanted:
                assert wanted[suffix].dtype == got[suffix].dtype
                assert wanted[suffix].tobytes() == got[suffix].tobytes()


def test_round_trip(module: Module, store: Store, tmp_path: Path) -> None:
    done: list[int] = []
    (file,) = write_safetensors(tmp_path / "w.safetensors", module, store, progress=done.append)
    _same(store, open_safetensors(file, module))
    assert sum(done) == nbytes(module)


def test_the_library_reads_it_too(module: Module, store: Store, tmp_path: Path) -> None:
    (file,) = write_safetensors(tmp_path / "w.safetensors", module, store)
    tensors = load_file(file)
    assert tensors["layers.q.codes"].shape == (3, 6, 3)
    assert tensors["layers.q.scales"].shape == (3, 3, 5)
    assert tensors["layers.k.zeros"].shape == (3, 4, 1)
    assert tensors["half"].dtype == ml_dtypes.bfloat16
    assert (tensors["layers.norm"][2] == store["layers.norm"].read(2)[""]).all()


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"w": array}, tmp_path / "w.safetensors")
    module = Module("m", params={"w": Param("w", Type("f32", (3, 4)))})
    assert (open_safetensors(tmp_path / "w.safetensors", module)["w"].read(0)[""] == array).all()


def test_data_and_large_tensors_are_aligned(module: Module, store: Store, tmp_path: Path) -> None:
    big = Param("big", Type("f32", (32, 16)), 2)
    more = module.with_params(big)
    arrays = Store({**store.entries, "big": Lazy(big, _reader(big))})
    (file,) = write_safetensors(tmp_path / "w.safetensors", more, arrays)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert (8 + length) % 64 == 0
    assert header["big"]["data_offsets"][0] == 0
    spans = sorted(row["data_offsets"] for name, row in header.items() if name != "__metadata__")
    assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_shards(module: Module, store: Store, tmp_path: Path) -> None:
    files = write_safetensors(tmp_path / "w.safetensors", module, store, shard_bytes=300)
    assert [f.name for f in files[:2]] == ["w-00001-of-00003.safetensors", "w-00002-of-00003.safetensors"]
    index = json.loads((tmp_path / "w.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == nbytes(module)
    assert index["weight_map"]["layers.q.codes"] == index["weight_map"]["layers.q.scales"]
    _same(store, open_safetensors(tmp_path / "w.safetensors", module))


def test_a_missing_shard_is_named(module: Module, store: Store, tmp_path: Path) -> None:
    files = write_safetensors(tmp_path / "w.safetensors", module, store, shard_bytes=300)
    files[1].unlink()
    with pytest.raises(EffcError, match=r"w-00002-of-00003.safetensors: No such file"):
        open_safetensors(tmp_path / "w.safetensors", module)


def test_one_layer_at_a_time(module: Module, store: Store, tmp_path: Path) -> None:
    """A layer is read once for all its parts, and let go before the next is read."""
    seen: list[tuple[str, int]] = []

    def spy(lazy: Lazy) -> Lazy:
        return Lazy(lazy.param, lambda i: (seen.append((lazy.param.name, i)), lazy.read(i))[1])

    write_safetensors(tmp_path / "w.safetensors", module, {n: spy(lazy) for n, lazy in store.items()})
    assert seen == [(p.name, i) for p in PARAMS for i in range(p.count)]


@pytest.mark.parametrize("cut", [0, 5, 20, -1])
def test_truncated(cut: int, module: Module, store: Store, tmp_path: Path) -> None:
    (file,) = write_safetensors(tmp_path / "w.safetensors", module, store)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(EffcError, match=r"w.safetensors: .*truncated"):
        open_safetensors(file, module)


@pytest.mark.parametrize("text", [b"[]", b"{}x", b'{"a": 1}', b'{"a":{"dtype":"F9","shape":[],"data_offsets":[0,4]}}'])
def test_a_header_that_is_none(text: bytes, module: Module, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(EffcError, match=r"w.safetensors: header is not safetensors"):
        open_safetensors(file, module)


def test_misfits(module: Module, store: Store, tmp_path: Path) -> None:
    (file,) = write_safetensors(tmp_path / "w.safetensors", module, store)
    wide = module.with_params(Param("embed", Type("f32", (10, 7))))
    with pytest.raises(EffcError, match=r"tensor 'embed' is float32\[10, 6\], want float32\[10, 7\]"):
        open_safetensors(file, wide)
    more = module.with_params(Param("embedd", Type("f32", (1,))))
    with pytest.raises(EffcError, match="no tensor 'embedd'"):
        open_safetensors(file, more)
    fewer = Module("m", params={n: p for n, p in module.params.items() if n != "layers.norm"})
    with pytest.raises(EffcError, match=r"tensor 'layers.norm' is no parameter of the module"):
        open_safetensors(file, fewer)


def test_arrays_that_are_not_what_the_type_says(tmp_path: Path) -> None:
    param = Param("w", Type("f32", (2, 2)), 2)
    module = Module("m", params={"w": param})
    with pytest.raises(EffcError, match=r"w\[0\]: is float64\[2, 2\], want float32\[2, 2\]"):
        write_safetensors(tmp_path / "w", module, {"w": Lazy(param, lambda i: {"": np.ones((2, 2))})})


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_nan_is_refused_by_name(dtype: str, tmp_path: Path) -> None:
    param = Param("w", Type(dtype, (2, 2)), 2)
    module = Module("m", params={"w": param})
    bad = np.array([[0, np.nan], [np.inf, 1]]).astype(parts(param.type)[""].dtype)
    good = np.where(np.isnan(bad.astype(np.float32)), -np.inf, bad.astype(np.float32)).astype(bad.dtype)
    with pytest.raises(EffcError, match=r"w\[1\]: holds NaN, want numbers"):
        write_safetensors(tmp_path / "w", module, {"w": Lazy(param, lambda i: {"": bad if i else good})})


def test_sizes(module: Module) -> None:
    assert nbytes(module) == sum(p.count * p.type.nbytes() for p in PARAMS if p.name != "layers.q") + 3 * (18 + 30)
    assert elements(module) == 60 + 18 + 90 + 72 + 9 + 7 + 4 + 1
    assert tensor_name("a", "") == "a"
    assert tensor_name("a", "codes") == "a.codes"


def test_replace_keeps_the_order_of_the_module(module: Module, store: Store) -> None:
    made = Lazy(PARAMS[0], lambda i: {"": np.zeros((10, 6), np.float32)})
    after = store.replace([made], module)
    assert list(after) == list(module.params)
    assert after["embed"] is made
