"""The head of a GGUF file: metadata and where each tensor lies.

The gguf library reads the same value by value through a memory map: two seconds for 49,152 tokens, a tenth of
that here; and it trips over a truncated file in many ways, where this says what is missing.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from effc.errors import EffcError

STRING, ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
ALIGNMENT = 32  # unless general.alignment says otherwise


@dataclass(frozen=True)
class Place:
    """shape as numpy has it, rows first; offset from the start of the file and size in bytes."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    fields: dict[str, Any]
    tensors: dict[str, Place]


def read_header(file: Path) -> Header:
    size = file.stat().st_size
    if size < 24:
        raise EffcError(f"{file}: truncated or not GGUF ({size} bytes), want the whole file")
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Cursor(file, data).header()
        except (struct.error, IndexError, ValueError, UnicodeDecodeError) as error:
            raise EffcError(f"{file}: truncated or not GGUF ({size} bytes): {error}") from None


class _Cursor:
    def __init__(self, file: Path, data: mmap.mmap):
        self.file, self.data, self.at = file, data, 0

    def header(self) -> Header:
        magic, version = self.data[:4], struct.unpack_from("<I", self.data, 4)[0]
        if magic != b"GGUF" or version not in (2, 3):
            raise EffcError(f"{self.file}: starts with {magic!r} version {version}, want GGUF version 2 or 3")
        self.at = 8
        tensors, fields = self.number("<u8"), self.number("<u8")
        values = {self.string(): self.value(self.number("<u4")) for _ in range(fields)}
        infos = [self.tensor() for _ in range(tensors)]
        start = -(-self.at // values.get("general.alignment", ALIGNMENT)) * values.get("general.alignment", ALIGNMENT)
        places = {name: _place(kind, shape, start + offset) for name, kind, shape, offset in infos}
        end = max((place.offset + place.size for place in places.values()), default=0)
        if len(self.data) < end:
            raise EffcError(f"{self.file}: truncated: {len(self.data)} bytes, want {end} as its header says")
        return Header(values, places)

    def number(self, kind: str) -> Any:
        value = np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0]
        return value.item()

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        self.at += 8
        return self.take(length).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.number("<u4"), self.number("<u8"))
        if kind not in NUMBERS:
            raise ValueError(f"metadata of unknown type {kind} at byte {self.at}")
        return self.number(NUMBERS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind in NUMBERS:
            return np.frombuffer(self.take(count * np.dtype(NUMBERS[kind]).itemsize), NUMBERS[kind]).tolist()
        return [self.value(kind) for _ in range(count)]

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string()
        shape = tuple(self.number("<u8") for _ in range(self.number("<u4")))
        return name, self.number("<u4"), shape[::-1], self.number("<u8")

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise ValueError(f"the header ends {count - len(piece)} bytes early")
        self.at += count
        return piece


def _place(kind: int, shape: tuple[int, ...], offset: int) -> Place:
    quantization = gguf.GGMLQuantizationType(kind)
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    return Place(quantization, shape, offset, math.prod(shape) // block * size)
