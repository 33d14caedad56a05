"""Arrays of an emitted program from `model.safetensors`: mapped, not read; aligned ones are not copied.

A dense parameter `layers.q` is the tensor of that name, a quantized one `layers.q.codes`, `.scales`
and `.zeros`; stacked ones have a leading axis that becomes a list, an array a layer (a loop over
layers can then use each where it lies).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effc.errors import EffcError, nearest
from effc.runtime.forms import BITS, held, row_bytes
from effc.runtime.primitives import dtype_of
from effc.runtime.program import Table
from effc.runtime.qarray import QArray

_SPEC = re.compile(
    r"(?:(?P<stack>\d+) \* )?(?P<dtype>\w+)(?:\{(?P<quant>[^}]*)\})?\[(?P<shape>[\d,]*)\]"
    r"(?: = (?P<stored>\S+))?"
)

_TAGS = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "f8e4m3", "F8_E5M2": "f8e5m2",
    "F8_E8M0": "f8e8m0",
    "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8",
    "U64": "u64", "U32": "u32", "U16": "u16", "U8": "u8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """An entry of `PARAMS`: `30 * q4{group=32,sym,scale=f16}[576,576] = layers.q`."""

    stored: str
    stack: int
    dtype: str
    quant: Mapping[str, str] | None
    shape: tuple[int, ...]


def parse_spec(key: str, text: str) -> Spec:
    """What `PARAMS` says of one parameter; `key` is its stored name unless the text gives another."""
    found = _SPEC.fullmatch(text)
    if not found:
        raise EffcError(f"{key}: '{text}' is no parameter type, want the like of '30 * f32[576,576]'")
    fields = None
    if found["quant"] is not None:
        pairs = (field.partition("=") for field in found["quant"].split(","))
        fields = {name: value for name, _, value in pairs}
    shape = tuple(int(size) for size in found["shape"].split(",") if size)
    return Spec(found["stored"] or key, int(found["stack"] or 0), found["dtype"], fields, shape)


def load_params(path: Path, table: Table) -> dict[str, Any]:
    """The tree that `extend` takes; `path` is one safetensors file, or shards with an index beside it."""
    tensors = open_tensors(path)
    out: dict[str, Any] = {}
    for key, entry in table.items():
        if isinstance(entry, str):
            out[key] = _load(path, tensors, parse_spec(key, entry))[0]
            continue
        columns = {k: _load(path, tensors, parse_spec(f"{key}.{k}", text)) for k, text in entry.items()}
        layers = max(map(len, columns.values()))
        out[key] = [{k: column[i] for k, column in columns.items() if i < len(column)} for i in range(layers)]
    return out


def _load(path: Path, tensors: Mapping[str, np.ndarray], spec: Spec) -> list[jax.Array | QArray]:
    """One array a layer; a list of one for what is not stacked."""

    def part(suffix: str, dtype: str, shape: tuple[int, ...]) -> list[jax.Array]:
        return _arrays(path, tensors, spec.stored + suffix, dtype, spec.stack, shape)

    if spec.quant is None:
        return list(part("", spec.dtype, spec.shape))
    form = spec.dtype if spec.dtype in BITS else "int"
    bits, group = BITS.get(form) or int(spec.dtype[1:]), int(spec.quant.get("group", 0))
    axis, scale = int(spec.quant.get("axis", -2)), spec.quant.get("scale", "f32")
    extent, grouped = spec.shape[axis], list(spec.shape)
    grouped[axis] = math.ceil(extent / (group or extent))
    width = spec.shape[-1]
    shape = (spec.stack or 1, *spec.shape[:-1], row_bytes(width, bits))
    stored = _tensor(path, tensors, spec.stored + ".codes", "u8" if bits < 8 else "i8", shape[not spec.stack :])
    codes = [jax.device_put(held(layer, width, bits)) for layer in stored.reshape(shape)]
    scales = part(".scales", scale, tuple(grouped))
    zeros = [None] * len(codes) if "sym" in spec.quant else part(".zeros", scale, tuple(grouped))
    rows = zip(codes, scales, zeros, strict=True)
    return [QArray(c, s, z, bits, group, axis, width, form) for c, s, z in rows]


def _arrays(
    path: Path, tensors: Mapping[str, np.ndarray], name: str, dtype: str, stack: int, shape: tuple[int, ...]
) -> list[jax.Array]:
    found = _tensor(path, tensors, name, dtype, (stack, *shape) if stack else shape)
    return [jax.device_put(layer) for layer in (found if stack else [found])]


def _tensor(path: Path, tensors: Mapping[str, np.ndarray], name: str, dtype: str, want: tuple[int, ...]) -> np.ndarray:
    """The tensor of that name; EffcError where it is none or another."""
    if name not in tensors:
        raise EffcError(f"{path}: no tensor '{name}'{nearest(name, tensors)}")
    found = tensors[name]
    if found.dtype != dtype_of(dtype) or found.shape != want:
        raise EffcError(f"{path}: '{name}' is {found.dtype}{list(found.shape)}, want {dtype}{list(want)}")
    return found


def open_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file or its shards, as views of the mapped file."""
    out: dict[str, np.ndarray] = {}
    for file in _files(path):
        out |= _mapped(file)
    return out


def _files(path: Path) -> list[Path]:
    index = path.with_name(path.name + ".index.json")
    if path.exists() or not index.exists():
        return [path]
    names = _checked(index, lambda: sorted(set(json.loads(index.read_text())["weight_map"].values())))
    return [path.with_name(name) for name in names]


def _mapped(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise EffcError(f"{file}: no such file, want the program's weights")
    data = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
    base = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or base > len(data):
        raise EffcError(f"{file}: {len(data)} bytes, shorter than its header: truncated or not safetensors")
    table = _checked(file, lambda: json.loads(data[8:base].tobytes()))
    rows = {name: row for name, row in table.items() if name != "__metadata__"}
    return {name: _checked(file, lambda row=row: _view(data, base, row)) for name, row in rows.items()}


def _view(data: np.ndarray, base: int, row: Mapping[str, Any]) -> np.ndarray:
    start, stop = row["data_offsets"]
    dtype, shape = dtype_of(_TAGS[row["dtype"]]), tuple(row["shape"])
    if base + stop > len(data) or stop - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"truncated at {len(data)} bytes")
    return np.ndarray(shape, dtype, buffer=data, offset=base + start)


def _checked(file: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives; a damaged header is told as such."""
    try:
        return read()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EffcError(f"{file}: damaged, want a safetensors file ({error})") from None
