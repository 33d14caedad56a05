"""What the linears of a model see of a text: for the input x[n,K] of each, x'x, mean |x| and the greatest |x|.

Collected layer by layer (`effc.ir.stream`), with memory for one layer's weights and sums, kept on disk under a
hash of the model and the tokens, and reused. Where one array serves several layers, theirs are taken together.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from effc.ir.core import Func, Module, Op, Ref
from effc.ir.ops import array_index, attribute
from effc.ir.printer import dump
from effc.ir.rewrite import inline_calls
from effc.ir.stream import Watch, look
from effc.ir.types import evaluate
from effc.weights import Array, Store

KEPT = 2 << 30
"""Bytes of statistics kept in the cache; those of a model with more are made anew each time."""

DONE = "done.json"


@dataclass(frozen=True)
class Seen:
    """Sums over rows of one input x[n,K]."""

    count: int
    square: Array  # f32[K,K]: x'x
    mean: Array  # f32[K]: mean |x|
    peak: Array  # f32[K]: greatest |x|


@dataclass(frozen=True)
class Place:
    """A value that a linear reads: of which function, in which layer."""

    func: str
    value: str
    layer: int

    @property
    def file(self) -> str:
        """Its name on disk."""
        return f"{quote(self.func, safe='')}-{quote(self.value, safe='')}-{self.layer}.npz"


Places = Mapping[tuple[str, int], Sequence[Place]]
"""For a matrix and the number of its array, what it is multiplied with."""


@dataclass(frozen=True)
class Statistics:
    """Statistics on disk, and whose they are."""

    folder: Path
    places: Places
    tokens: int
    source: str

    def has(self, name: str) -> bool:
        """Whether something was seen of the input of this matrix."""
        return (name, 0) in self.places

    def renamed(self, came: Mapping[str, tuple[str, int]]) -> Statistics:
        """For parameters that are pieces of others: the old name, and the number of the first array."""
        more = {
            (new, i - first): found
            for new, (old, first) in came.items()
            for (name, i), found in self.places.items()
            if name == old and i >= first
        }
        return replace(self, places={**self.places, **more})

    def of(self, name: str, layer: int) -> Seen:
        """Of the input of a matrix's array."""
        found = [_read(self.folder / place.file) for place in self.places[name, layer]]
        count = sum(seen.count for seen in found)
        return Seen(
            count,
            sum((seen.square for seen in found[1:]), found[0].square),
            sum((seen.mean * (seen.count / count) for seen in found), np.zeros_like(found[0].mean)),
            np.max([seen.peak for seen in found], axis=0),
        )


def _read(file: Path) -> Seen:
    with np.load(file) as arrays:
        return Seen(int(arrays["count"]), arrays["square"], arrays["mean"], arrays["peak"])


# ---- where


def places(module: Module) -> Places:
    """Inputs of the linears that the forward function runs, regions and unusual loops left out."""
    out: dict[tuple[str, int], list[Place]] = {}
    for name, array, place in _places(module, inline_calls(module, module.forward()), 0, ()):
        known = out.setdefault((name, array), [])
        if place not in known:
            known.append(place)
    return out


def _places(module: Module, func: Func, layer: int, order: Any) -> Iterator[tuple[str, int, Place]]:
    for op in func.ops:
        if op.kind == "linear":
            name = op.params["w"]
            stack = module.params[name].stack
            yield name, array_index(order, stack, layer) if stack else 0, Place(func.name, op.inputs[0], layer)
        elif op.kind == "repeat":
            yield from _repeated(module, op)


def _repeated(module: Module, op: Op) -> Iterator[tuple[str, int, Place]]:
    ref, times, start = (attribute(op, name) for name in ("block", "times", "start"))
    assert isinstance(ref, Ref) and isinstance(times, int) and isinstance(start, int)
    block = inline_calls(module, module.funcs[ref.name])
    for layer in range(start, start + times):
        yield from _places(module, block, layer, attribute(op, "order"))


# ---- made


def statistics(
    module: Module, store: Store, tokens: Sequence[Array], *, source: str, spare: Path,
    progress: Callable[[str], None] = lambda said: None,
) -> Statistics:  # fmt: skip
    """Of token ids i32[b,n]: from the cache, or collected into it (into `spare` where they are too many)."""
    where = places(module)
    count = sum(chunk.size for chunk in tokens)
    parent = cache_folder() if _size(module, where) <= KEPT else spare
    folder = parent / _key(module, store, tokens)
    if (folder / DONE).exists():
        progress(f"statistics of {count} tokens of {source}: reused")
    else:
        progress(f"statistics of {count} tokens of {source}: collected")
        _collect(module, store, tokens, where, folder)
    return Statistics(folder, where, count, source)


def cache_folder() -> Path:
    """Where statistics are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "effc" / "statistics"


def _size(module: Module, where: Places) -> int:
    widths = {place: _width(module, place) for found in where.values() for place in found}
    return sum(4 * width * width for width in widths.values())


def _width(module: Module, place: Place) -> int:
    types = inline_calls(module, module.funcs[place.func]).types()
    return evaluate(types[place.value].shape[-1], {})


def model_hash(module: Module, store: Store) -> str:
    """Of structure and arrays, read one at a time."""
    digest = hashlib.blake2b(dump(module).encode(), digest_size=16)
    for name, param in module.params.items():
        for layer in range(param.count):
            for suffix, array in sorted(store[name].read(layer).items()):
                digest.update(f"{name} {layer} {suffix} {array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _key(module: Module, store: Store, tokens: Sequence[Array]) -> str:
    digest = hashlib.blake2b(model_hash(module, store).encode(), digest_size=16)
    for chunk in tokens:
        digest.update(str(chunk.shape).encode() + np.ascontiguousarray(chunk, np.int32).tobytes())
    return digest.hexdigest()


def _collect(module: Module, store: Store, tokens: Sequence[Array], where: Places, folder: Path) -> None:
    """Into a folder beside, renamed when all is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        sums = _Sums(work)
        look(module, store, [jnp.asarray(chunk) for chunk in tokens], Watch(_watched(where), sums.see))
        sums.flush()
        (work / DONE).write_text(json.dumps({"module": module.name, "tokens": sum(c.size for c in tokens)}))
        if not folder.exists():
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _watched(where: Places) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for found in where.values():
        for place in found:
            names = out.setdefault(place.func, [])
            names += [place.value] * (place.value not in names)
    return out


@dataclass
class _Sums:
    """Sums of the layer at hand, on the device; written when another layer's come."""

    folder: Path

    def __post_init__(self) -> None:
        self.here: tuple[str, int] = ("", 0)
        self.sums: dict[str, list[Any]] = {}

    def see(self, func: str, layer: int, values: Mapping[str, jax.Array]) -> None:
        if (func, layer) != self.here:
            self.flush()
            self.here = func, layer
        for name, value in values.items():
            rows = value.reshape(-1, value.shape[-1])
            new = [math.prod(value.shape[:-1]), *_summed(rows)]
            self.sums[name] = _joined(self.sums[name], new) if name in self.sums else new
        jax.block_until_ready(list(self.sums.values()))

    def flush(self) -> None:
        """To disk, on top of what an earlier run of the same layer left there."""
        for name, sums in self.sums.items():
            file = self.folder / Place(self.here[0], name, self.here[1]).file
            count, square, total, peak = _joined(_again(file), sums) if file.exists() else sums
            mean = np.asarray(total) / count
            np.savez(file, count=count, square=np.asarray(square), mean=mean, peak=np.asarray(peak))
        self.sums = {}


def _again(file: Path) -> list[Any]:
    seen = _read(file)
    return [seen.count, seen.square, seen.mean * seen.count, seen.peak]


@jax.jit
def _summed(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = rows.astype(jnp.float32)
    wide = jnp.abs(rows)
    return rows.T @ rows, wide.sum(0), wide.max(0)


def _joined(one: list[Any], two: list[Any]) -> list[Any]:
    return [one[0] + two[0], one[1] + two[1], one[2] + two[2], jnp.maximum(one[3], two[3])]
