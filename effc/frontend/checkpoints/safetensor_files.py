"""One or many safetensors files as Tensors: headers checked against file length, arrays read unmapped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from effc.errors import EffcError
from effc.frontend.checkpoints.tensors import FLOATS

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(np.uint8),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Entry:
    """offset is in bytes from the start of the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int


class SafetensorFiles:
    kinds = FLOATS

    def __init__(self, files: Iterable[Path], where: str):
        self.where = where
        self.entries = {name: entry for file in files for name, entry in read_header(file).items()}

    def names(self) -> Iterable[str]:
        return self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def kind(self, name: str) -> str:
        return self.entries[name].kind

    def read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        # Not a memory map: its touched pages count as resident until the whole file is unmapped.
        flat = np.fromfile(entry.file, DTYPES[entry.kind], math.prod(entry.shape), offset=entry.offset)
        return flat.reshape(entry.shape)


def read_header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise EffcError(f"{file}: truncated: {size} bytes, want at least {8 + length} for the header alone")
        try:
            header = json.loads(f.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise EffcError(f"{file}: no safetensors header, want a file written by safetensors") from None
    try:
        return _entries(file, header, 8 + length, size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EffcError(f"{file}: damaged safetensors header: {type(error).__name__} {error}") from None


def _entries(file: Path, header: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    header.pop("__metadata__", None)
    end = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size < end:
        raise EffcError(f"{file}: truncated: {size} bytes, want {end} as its header says")
    return {name: _entry(file, name, tensor, start) for name, tensor in header.items()}


def _entry(file: Path, name: str, tensor: dict, start: int) -> Entry:
    kind, shape, (begin, end) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
    if kind in DTYPES and end - begin != math.prod(shape) * DTYPES[kind].itemsize:
        raise EffcError(f"{file}: tensor '{name}' takes {end - begin} bytes, want {math.prod(shape)} {kind} values")
    return Entry(file, kind, shape, start + begin)
