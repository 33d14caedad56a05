"""A calibrated threshold holds for one model decoded one way: a hash of both, and the check when it is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from effc.errors import EffcError
from effc.ir.core import Module
from effc.ir.printer import dump
from effc.weights import Lazy

BOUND = "bound"
"""Attribute of `decode` that holds the hash."""


def fingerprint(module: Module, store: Mapping[str, Lazy]) -> str:
    """sha256 of the program with all its settings, threshold included, and of every array; reads all of them."""
    digest = hashlib.sha256(dump(_bare(module)).encode())
    for name, param in module.params.items():
        for i in range(param.count):
            for part, array in sorted(store[name].read(i).items()):
                digest.update(f"{name} {i} {part} {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def bind(module: Module, store: Mapping[str, Lazy]) -> Module:
    """The module with the hash in its `decode`."""
    assert module.decode is not None
    bare = _bare(module)
    assert bare.decode is not None
    attrs = {**bare.decode.attrs, BOUND: fingerprint(bare, store)}
    return replace(module, decode=replace(module.decode, attrs=attrs))


def check(module: Module, store: Mapping[str, Lazy], where: str) -> None:
    """EffcError where the module holds a hash that is not its own; nothing is read where it holds none."""
    told = module.decode.attrs.get(BOUND) if module.decode else None
    if told is not None and told != fingerprint(module, store):
        raise EffcError(
            f"{where}: {_what(module)} was calibrated for other weights or settings than these, "
            "so the guarantee is void; want the artifact as effc optimize wrote it, or a new run of effc optimize"
        )


def _what(module: Module) -> str:
    """What the numbers are of."""
    return "the threshold of exits" if module.decode and module.decode.strategy == "early" else "the cascade"


def _bare(module: Module) -> Module:
    """Without the hash, and without where the model came from."""
    if module.decode is None:
        return module
    attrs = {name: value for name, value in module.decode.attrs.items() if name != BOUND}
    return replace(module, meta={}, decode=replace(module.decode, attrs=attrs))
