"""Tensors of a checkpoint matched to the leaves of a model: checked at open, read one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from effc.errors import EffcError, nearest
from effc.frontend.source import Spec

FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = ("float32", "bfloat16", "float16")


class Tensors(Protocol):
    """Named arrays on disk; `kind` is the stored type's name, `kinds` those that read() turns into floats."""

    @property
    def where(self) -> str: ...

    @property
    def kinds(self) -> Collection[str]: ...

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def kind(self, name: str) -> str: ...

    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Ref:
    """How one leaf is made: the stored tensor, passed through fix, then transposed."""

    tensor: str
    transpose: bool = False
    fix: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class MatchedWeights:
    """Weights over Tensors: read() converts to the leaf's shape and dtype, and refuses NaN."""

    tensors: Tensors
    refs: Mapping[str, Ref]
    specs: Mapping[str, Spec]

    def names(self) -> Iterable[str]:
        return self.specs

    def spec(self, name: str) -> Spec:
        return self.specs[name]

    def read(self, name: str) -> np.ndarray:
        ref, spec = self.refs[name], self.specs[name]
        array = self.tensors.read(ref.tensor)
        if ref.fix is not None:
            array = ref.fix(array)
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array.T if ref.transpose else array, dtype=spec.dtype)
        # One pass, no temporary: a float64 sum of float32s cannot overflow, so it is finite if every term is.
        if not np.isfinite(np.sum(array, dtype=np.float64)):
            bad = int(np.sum(~np.isfinite(array.astype(np.float32))))
            raise EffcError(
                f"{self.tensors.where}: tensor '{ref.tensor}' has {bad} values that are not finite, "
                f"want none as {spec.dtype}"
            )
        return array.reshape(spec.shape)


def match(
    tensors: Tensors, refs: Mapping[str, Ref], specs: Mapping[str, Spec], ignored: str = "(?!)"
) -> MatchedWeights:
    """Checks that every leaf has a tensor of its shape, and every tensor a leaf unless `ignored` matches."""
    names = set(tensors.names())
    missing = [(path, ref.tensor) for path, ref in refs.items() if ref.tensor not in names]
    left = sorted(names - {ref.tensor for ref in refs.values()})
    left = [name for name in left if not re.search(ignored, name)]
    if missing:
        path, name = missing[0]
        raise EffcError(
            f"{tensors.where}: no tensor '{name}' for parameter '{path}' "
            f"({_count(missing, 'missing')}){nearest(name, left)}"
        )
    if left:
        raise EffcError(
            f"{tensors.where}: {_count(left, 'unmatched')}: {', '.join(left[:5])}; "
            "want none that the model does not use"
        )
    for path, spec in specs.items():
        _check(tensors, refs[path], path, spec)
    return MatchedWeights(tensors, refs, specs)


def match_by_path(tensors: Tensors, specs: Mapping[str, Spec], ignored: str = "(?!)") -> MatchedWeights:
    """For what the module's own code saved: names equal paths but for separators and wrappers."""
    names = list(tensors.names())
    stored = {name: _plain(name) for name in names}
    prefix = _wrapper(list(stored.values()), [_plain(path) for path in specs])
    by_path = {plain.removeprefix(prefix): name for name, plain in stored.items() if plain.startswith(prefix)}
    refs = {path: Ref(by_path.get(_plain(path), path)) for path in specs}
    outside = "|".join(re.escape(name) for name, plain in stored.items() if not plain.startswith(prefix))
    return match(tensors, refs, specs, f"{ignored}|^(?:{outside})$" if outside else ignored)


def check_dtype(dtype: str) -> np.dtype:
    if dtype not in DTYPES:
        raise EffcError(f"dtype: no '{dtype}', want {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    return np.dtype(dtype)


def _plain(name: str) -> str:
    """One spelling: 'params.layers.0.kernel.value' and 'params/layers/0/kernel' are the same."""
    return "/".join(part for part in re.split(r"[/.]", name) if part != "value")


def _wrapper(stored: list[str], wanted: list[str]) -> str:
    """The leading keys ('params/', 'model/') under which the checkpoint holds the wanted leaves."""
    first = wanted[0]
    wrappers = {name.removesuffix(first) for name in stored if name == first or name.endswith(f"/{first}")}
    return max(wrappers, key=lambda w: (sum(w + path in stored for path in wanted[:20]), -len(w)), default="")


def _check(tensors: Tensors, ref: Ref, path: str, spec: Spec) -> None:
    kind, shape = tensors.kind(ref.tensor), tensors.shape(ref.tensor)
    if kind not in tensors.kinds:
        raise EffcError(
            f"{tensors.where}: tensor '{ref.tensor}' is {kind}, want {', '.join(tensors.kinds)}; "
            "weights quantized this way are not read, give the original checkpoint"
        )
    found = shape[::-1] if ref.transpose else shape
    if tuple(found) != tuple(spec.shape):
        want = spec.shape[::-1] if ref.transpose else spec.shape
        raise EffcError(
            f"{tensors.where}: tensor '{ref.tensor}' is {list(shape)}, want {list(want)} for parameter '{path}'"
        )


def _count(items: list, what: str) -> str:
    return f"{len(items)} tensor{'s' * (len(items) > 1)} {what}"
