"""Flax msgpack files as Tensors: one walk over the structure at open, each array read from its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgpack
import numpy as np

from effc.errors import EffcError
from effc.frontend.checkpoints.hf import source_of
from effc.frontend.checkpoints.orbax import KINDS
from effc.frontend.source import Source

ARRAY = 1  # flax.serialization's extension type; its payload is msgpack: (shape, dtype name, bytes)
CHUNKED = "__msgpack_chunked_array__"


@dataclass(frozen=True)
class Place:
    """offset and size of the raw values in the file, in bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int


class MsgpackTensors:
    kinds = tuple(KINDS.values())

    def __init__(self, file: Path):
        self.where = str(file)
        size = file.stat().st_size
        with file.open("rb") as f:
            try:
                self.places = dict(_walk(f, ""))
            except (EOFError, ValueError, msgpack.UnpackException) as error:
                raise EffcError(f"{file}: truncated or not Flax msgpack ({size} bytes): {error}") from None

    def names(self) -> Iterable[str]:
        return self.places

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape

    def kind(self, name: str) -> str:
        return KINDS.get(self.places[name].kind, self.places[name].kind)

    def read(self, name: str) -> np.ndarray:
        place = self.places[name]
        count = int(np.prod(place.shape, dtype=np.int64))
        return np.fromfile(self.where, np.dtype(place.kind), count, offset=place.offset).reshape(place.shape)


class HfFlaxTensors(MsgpackTensors):
    """transformers' flax_model.msgpack under PyTorch's names: 'a/kernel' [in,out] is 'a.weight' [out,in].

    FlaxGPT2 stores its Conv1D kernels [out,in], where PyTorch has [in,out]: the same transpose.
    """

    def __init__(self, file: Path):
        super().__init__(file)
        self.stored = {re.sub(r"\.(kernel|embedding|scale)$", ".weight", n.replace("/", ".")): n for n in self.places}

    def names(self) -> Iterable[str]:
        return self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(self.stored[name])
        return shape[::-1] if self._turned(name) else shape

    def kind(self, name: str) -> str:
        return super().kind(self.stored[name])

    def read(self, name: str) -> np.ndarray:
        array = super().read(self.stored[name])
        return array.T if self._turned(name) else array

    def _turned(self, name: str) -> bool:
        return self.stored[name].endswith("/kernel")


def open_hf_flax(folder: Path, dtype: np.dtype) -> Source:
    return source_of(folder, HfFlaxTensors(folder / "flax_model.msgpack"), "msgpack", dtype)


def _walk(f: BinaryIO, path: str) -> Iterator[tuple[str, Place]]:
    """The arrays below one msgpack value; f is left at its end."""
    tag = _take(f, 1)[0]
    if 0x80 <= tag <= 0x8F or tag in (0xDE, 0xDF):
        size = tag & 0x0F if tag <= 0x8F else _int(f, 2 if tag == 0xDE else 4)
        for _ in range(size):
            key = _key(f)
            if key == CHUNKED:
                raise ValueError(f"array '{path}' is over 1 GiB and stored in pieces, want safetensors or Orbax")
            yield from _walk(f, f"{path}/{key}" if path else key)
    elif tag in (0xC7, 0xC8, 0xC9) or 0xD4 <= tag <= 0xD8:
        size = _int(f, 1 << (tag - 0xC7)) if tag <= 0xC9 else 1 << (tag - 0xD4)
        code = _int(f, 1)
        end = f.tell() + size
        if code == ARRAY:
            yield path, _place(f, path)
        _seek(f, end)
    else:
        _skip(f, tag)


def _place(f: BinaryIO, path: str) -> Place:
    """Reads (shape, dtype) and stops at the values: the bytes are the payload's last item."""
    head = f.tell()
    unpacker = msgpack.Unpacker(f, raw=False, read_size=256, max_buffer_size=0)
    if unpacker.read_array_header() != 3:
        raise ValueError(f"'{path}' is not an array")
    shape, dtype = unpacker.unpack(), unpacker.unpack()
    _seek(f, head + unpacker.tell())
    tag = _take(f, 1)[0]
    if tag not in (0xC4, 0xC5, 0xC6):
        raise ValueError(f"'{path}' has no values")
    size = _int(f, 1 << (tag - 0xC4))
    if size != int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize:
        raise ValueError(f"array '{path}' has {size} bytes for {shape} {dtype}")
    return Place(dtype, tuple(shape), f.tell())


def _key(f: BinaryIO) -> str:
    tag = _take(f, 1)[0]
    if 0xA0 <= tag <= 0xBF:
        return _take(f, tag & 0x1F).decode()
    if tag in (0xD9, 0xDA, 0xDB):
        return _take(f, _int(f, 1 << (tag - 0xD9))).decode()
    raise ValueError("a key that is not text")


WIDTHS = (
    {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
    | {0xCC + i: 1 << i for i in range(4)}
    | {0xD0 + i: 1 << i for i in range(4)}
)


def _skip(f: BinaryIO, tag: int) -> None:
    """Past a value that is no array: nil, bool, number, text."""
    if tag <= 0x7F or tag >= 0xE0:
        return
    if 0xA0 <= tag <= 0xBF:
        _take(f, tag & 0x1F)
    elif tag in (0xD9, 0xDA, 0xDB):
        _take(f, _int(f, 1 << (tag - 0xD9)))
    elif tag in WIDTHS:
        _take(f, WIDTHS[tag])
    else:
        raise ValueError(f"unexpected byte {tag:#x} at {f.tell() - 1}")


def _take(f: BinaryIO, count: int) -> bytes:
    data = f.read(count)
    if len(data) < count:
        raise EOFError("the file ends early")
    return data


def _int(f: BinaryIO, count: int) -> int:
    return int.from_bytes(_take(f, count), "big")


def _seek(f: BinaryIO, end: int) -> None:
    if f.seek(0, 2) < end:
        raise EOFError("the file ends early")
    f.seek(end)
