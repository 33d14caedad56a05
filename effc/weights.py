"""The weight store: arrays by name, read a layer at a time and never kept; safetensors in and out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16 and the 8-bit floats)
import numpy as np

from effc.errors import EffcError, nearest
from effc.ir.core import Module, Param
from effc.ir.types import NUMPY, Quant, Type, evaluate
from effc.runtime.forms import row_bytes

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
"""One layer of a parameter: {"": array}, or codes, scales and (asymmetric) zeros."""

Progress = Callable[[int], None]
"""Called with the number of bytes just done."""

ALIGN = 64
SHARD_BYTES = 5 * 10**9

_TAGS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_TAG_OF = {np.dtype(name): tag for tag, name in _TAGS.items()}


@dataclass(frozen=True)
class Lazy:
    """A parameter and how to read its i-th array, i in range(param.count)."""

    param: Param
    read: Callable[[int], Arrays]


@dataclass(frozen=True, eq=False)
class Store(Mapping[str, Lazy]):
    """Every parameter of a module by name; holds no array."""

    entries: Mapping[str, Lazy]

    def __getitem__(self, name: str) -> Lazy:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def replace(self, made: Iterable[Lazy], module: Module) -> Store:
        """The store of `module`: `made` where given, else what this one has."""
        merged = {**self.entries, **{lazy.param.name: lazy for lazy in made}}
        return Store({name: merged[name] for name in module.params})


@dataclass(frozen=True)
class Part:
    """One stored array of one layer: its numpy dtype and shape."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def parts(type_: Type) -> dict[str, Part]:
    """What is stored for a parameter of this type, by suffix."""
    shape = tuple(evaluate(size, {}) for size in type_.shape)
    if not isinstance(type_.dtype, Quant):
        return {"": Part(np.dtype(NUMPY[type_.dtype]), shape)}
    quant = type_.dtype
    scales = Part(np.dtype(NUMPY[quant.scale]), scale_shape(quant, shape))
    zeros = {} if quant.sym else {"zeros": scales}
    return {"codes": _codes(quant, shape), "scales": scales, **zeros}


def scale_shape(quant: Quant, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with the coded axis counted in groups."""
    extent = shape[quant.axis]
    groups = math.ceil(extent / (quant.group or extent)) if extent else 0
    out = list(shape)
    out[quant.axis] = groups
    return tuple(out)


def _codes(quant: Quant, shape: tuple[int, ...]) -> Part:
    stored = np.uint8 if quant.bits < 8 else np.int8
    return Part(np.dtype(stored), (*shape[:-1], row_bytes(shape[-1], quant.bits)))


def tensor_name(param: str, part: str) -> str:
    """The name a part has on disk: `layers.q`, `layers.q.codes`."""
    return f"{param}.{part}" if part else param


def nbytes(module: Module) -> int:
    """Bytes of every parameter of the module."""
    return sum(p.count * part.nbytes for p in module.params.values() for part in parts(p.type).values())


def elements(module: Module) -> int:
    """Number of weights, however coded."""
    return sum(p.count * evaluate(p.type.size(), {}) for p in module.params.values())


# ---- out


@dataclass(frozen=True)
class _Tensor:
    """A part of a parameter with all its layers, and where it begins in the file's data."""

    param: Param
    suffix: str
    part: Part
    offset: int = 0

    @property
    def name(self) -> str:
        return tensor_name(self.param.name, self.suffix)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.param.stack, *self.part.shape) if self.param.stack else self.part.shape

    @property
    def nbytes(self) -> int:
        return self.param.count * self.part.nbytes


def write_safetensors(
    path: Path,
    module: Module,
    store: Mapping[str, Lazy],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Stream the store to `path`, or to numbered shards beside it and an index; returns the files made."""
    shards = _shards(list(module.params.values()), shard_bytes)
    if len(shards) == 1:
        _write_file(path, shards[0], store, progress)
        return [path]
    files = [path.with_name(f"{path.stem}-{i + 1:05d}-of-{len(shards):05d}{path.suffix}") for i in range(len(shards))]
    for file, params in zip(files, shards, strict=True):
        _write_file(file, params, store, progress)
    return [*files, _write_index(path, files, shards)]


def _shards(params: list[Param], limit: int) -> list[list[Param]]:
    shards: list[list[Param]] = [[]]
    size = 0
    for param in params:
        more = sum(t.nbytes for t in _tensors([param]))
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(param)
        size += more
    return shards


def _tensors(params: Iterable[Param]) -> list[_Tensor]:
    return [_Tensor(param, suffix, part) for param in params for suffix, part in parts(param.type).items()]


def _placed(params: Iterable[Param]) -> list[_Tensor]:
    """Offsets without holes; sizes that keep the alignment come first, so that most tensors start aligned."""
    tensors = sorted(_tensors(params), key=lambda t: (-math.gcd(t.nbytes, ALIGN), -t.nbytes, t.name))
    out: list[_Tensor] = []
    offset = 0
    for tensor in tensors:
        out.append(_Tensor(tensor.param, tensor.suffix, tensor.part, offset))
        offset += tensor.nbytes
    return out


def _header(tensors: list[_Tensor]) -> bytes:
    """Length, then JSON padded with spaces to the alignment of the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "effc"}}
    for t in tensors:
        span = [t.offset, t.offset + t.nbytes]
        entries[t.name] = {"dtype": _TAG_OF[t.part.dtype], "shape": list(t.shape), "data_offsets": span}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, params: list[Param], store: Mapping[str, Lazy], progress: Progress | None) -> None:
    placed = _placed(params)
    header = _header(placed)
    by_param = {param.name: {t.suffix: t for t in placed if t.param.name == param.name} for param in params}
    with path.open("wb") as file:
        file.write(header)
        for param in params:
            for layer in range(param.count):
                arrays = store[param.name].read(layer)
                done = sum(_put(file.fileno(), len(header), t, layer, arrays) for t in by_param[param.name].values())
                if progress:
                    progress(done)


def _put(fd: int, base: int, tensor: _Tensor, layer: int, arrays: Arrays) -> int:
    """Write one layer of one tensor in its place; refuses arrays that are not what the type says."""
    array = np.asarray(arrays[tensor.suffix], order="C")
    where = f"{tensor.name}[{layer}]" if tensor.param.stack else tensor.name
    if array.dtype != tensor.part.dtype or array.shape != tensor.part.shape:
        got = f"{array.dtype}{list(array.shape)}"
        raise EffcError(f"{where}: is {got}, want {tensor.part.dtype}{list(tensor.part.shape)}")
    if array.dtype.kind not in "iub" and has_nan(array):
        raise EffcError(f"{where}: holds NaN, want numbers")
    view, offset = (
        memoryview(array.reshape(-1).view(np.uint8).data),
        base + tensor.offset + layer * tensor.part.nbytes,
    )
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
    return tensor.part.nbytes


def has_nan(array: Array) -> bool:
    """Whether any element is NaN, without an array of flags: the greatest of anything and NaN is NaN."""
    with np.errstate(invalid="ignore"):  # bfloat16's maximum warns of what is looked for
        return bool(array.size and np.isnan(np.float64(np.max(array))))


def _write_index(path: Path, files: list[Path], shards: list[list[Param]]) -> Path:
    tensors = [(file.name, t) for file, params in zip(files, shards, strict=True) for t in _tensors(params)]
    total = sum(t.nbytes for _, t in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": {t.name: file for file, t in tensors}}
    out = path.with_name(path.name + ".index.json")
    out.write_text(json.dumps(index, indent=1) + "\n")
    return out


# ---- in


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies on disk."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


def open_safetensors(path: Path, module: Module) -> Store:
    """The module's arrays from `path` (or its shards); tensors are checked against the types, none is read."""
    found: dict[str, _Entry] = {}
    for file in _files(path):
        found.update(_entries(file))
    wanted = {t.name: t for t in _tensors(module.params.values())}
    _check_names(path, found, wanted)
    for name, tensor in wanted.items():
        _check_tensor(path, found[name], tensor)
    return Store({p.name: Lazy(p, _reader(p, found)) for p in module.params.values()})


def _files(path: Path) -> list[Path]:
    index = path.with_name(path.name + ".index.json")
    if path.exists() or not index.exists():
        return [path]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EffcError(f"{index}: not an index of shards ({error})") from None
    return [path.with_name(str(name)) for name in names]


def _entries(file: Path) -> dict[str, _Entry]:
    """The file's own table of contents, checked against its size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= size - 8 else b""
    except OSError as error:
        raise EffcError(f"{file}: {error.strerror}, want a safetensors file") from None
    if size < 8 or length > size - 8:
        raise EffcError(f"{file}: {size} bytes, shorter than its header: truncated or not safetensors")
    try:
        table = json.loads(text)
        entries = {k: _entry(file, v, 8 + length) for k, v in table.items() if k != "__metadata__"}
        end = max((v["data_offsets"][1] for k, v in table.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise EffcError(f"{file}: header is not safetensors ({error})") from None
    if 8 + length + end != size:
        raise EffcError(f"{file}: {size} bytes, want {8 + length + end}: truncated or damaged")
    return entries


def _entry(file: Path, row: Mapping[str, Any], base: int) -> _Entry:
    dtype, shape = np.dtype(_TAGS[row["dtype"]]), tuple(row["shape"])
    start, stop = row["data_offsets"]
    if stop - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{stop - start} bytes for {dtype}{list(shape)}")
    return _Entry(file, dtype, shape, base + start)


def _check_names(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise EffcError(f"{path}: no tensor '{missing[0]}'{_more(missing)}{nearest(missing[0], extra)}")
    if extra:
        near = nearest(extra[0], wanted)
        raise EffcError(f"{path}: tensor '{extra[0]}'{_more(extra)} is no parameter of the module{near}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_tensor(path: Path, entry: _Entry, tensor: _Tensor) -> None:
    if (entry.dtype, entry.shape) != (tensor.part.dtype, tensor.shape):
        got, want = f"{entry.dtype}{list(entry.shape)}", f"{tensor.part.dtype}{list(tensor.shape)}"
        raise EffcError(f"{path}: tensor '{tensor.name}' is {got}, want {want}")


def _reader(param: Param, found: Mapping[str, _Entry]) -> Callable[[int], Arrays]:
    entries = {s: (found[tensor_name(param.name, s)], part) for s, part in parts(param.type).items()}
    return lambda i: {suffix: _mapped(entry, part, i) for suffix, (entry, part) in entries.items()}


def _mapped(entry: _Entry, part: Part, layer: int) -> Array:
    """A mapping that lives as long as the array: pages read leave memory with it."""
    if not part.nbytes:
        return np.zeros(part.shape, part.dtype)
    offset = entry.start + layer * part.nbytes
    return np.memmap(entry.file, dtype=part.dtype, mode="r", offset=offset, shape=part.shape).view(np.ndarray)
