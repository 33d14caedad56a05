"""Narrow caches: keys and values of attention as 8- or 4-bit codes, a scale a token and head."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from effc.ir.analysis import cache_bytes_per_token
from effc.ir.core import Func, Module, Op
from effc.ir.rewrite import replace_ops
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase

KEPT = frozenset({"attention", "keep"})
"""Ops that keep keys and values: attention, and what runs in its place where a layer is skipped."""


@dataclass(frozen=True)
class NarrowCache(Pass, ABC):
    """Every attention sees keys and values as the cache will hold them, with a cache or without."""

    phase: ClassVar[Phase] = Phase.QUANTIZE
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    writes: ClassVar[frozenset[str]] = KEPT
    kind: ClassVar[str]

    def requires(self, module: Module) -> None:
        found = [op for _, op in _attentions(module)]
        if not found:
            raise PassError(f"{self.name}: {module.name} has no attention, want one whose keys and values are kept")
        for func, op in _attentions(module):
            self._check(func, op)

    def _check(self, func: Func, op: Op) -> None:
        """A row of codes and its scale must be a whole number of bytes."""
        types = func.types()
        odd = [str(types[name]) for name in op.inputs[1:3] if int(str(types[name].shape[-1])) % 2]
        if self.kind == "i4" and odd:
            raise PassError(f"{self.name}: @{func.name} keeps {odd[0]}, want an even number of dims a head")

    def run(self, module: Module, notes: Notes) -> Module:
        before, count = cache_bytes_per_token(module), 0
        for func in module.funcs.values():
            changed = replace_ops(func, self._narrowed)
            count += sum(op.kind in KEPT for op in func.ops)
            module = module if changed == func else module.with_func(changed)
        told = f"{count} op{'s' * (count > 1)} keep keys and values as {self.kind}"
        notes.chose(f"{told}: {before} -> {cache_bytes_per_token(module)} bytes a token")
        return module

    def _narrowed(self, op: Op) -> list[Op] | None:
        if op.kind not in KEPT:
            return None
        return [replace(op, attrs={**op.attrs, "cache": self.kind})]

    def ensures(self, before: Module, after: Module) -> None:
        small, large = cache_bytes_per_token(after), cache_bytes_per_token(before)
        if before != after and small >= large:
            raise PassError(f"{self.name}: {small} bytes of cache a token after, {large} before: nothing was saved")


def _attentions(module: Module) -> Iterator[tuple[Func, Op]]:
    for func in module.funcs.values():
        yield from ((func, op) for op in func.ops if op.kind == "attention")


@dataclass(frozen=True)
class Kv8(NarrowCache):
    """Keys and values in the cache as 8-bit codes, a scale a token and head."""

    name: ClassVar[str] = "kv8"
    kind: ClassVar[str] = "i8"


@dataclass(frozen=True)
class Kv4(NarrowCache):
    """Keys and values in the cache as 4-bit codes, a scale a token and head."""

    name: ClassVar[str] = "kv4"
    kind: ClassVar[str] = "i4"
