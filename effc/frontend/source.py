"""What every checkpoint reader returns: a pure forward function and where its arrays come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

PyTree = Any
Spec = jax.ShapeDtypeStruct


class Weights(Protocol):
    """Arrays by leaf path, read one at a time and never kept: the caller frees them."""

    def names(self) -> Iterable[str]: ...

    def spec(self, name: str) -> Spec: ...

    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class InMemory:
    """Arrays that somebody else keeps, by path."""

    arrays: Mapping[str, Any]

    def names(self) -> Iterable[str]:
        return self.arrays

    def spec(self, name: str) -> Spec:
        return Spec(np.shape(self.arrays[name]), self.arrays[name].dtype)

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self.arrays[name])


@dataclass(frozen=True)
class TokenizerFiles:
    """json is tokenizer.json; extra the files beside it (tokenizer_config.json, chat_template.jinja)."""

    json: bytes
    extra: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A trained model to compile; a leaf of spec is named by its dict keys joined with '/'."""

    name: str
    forward: Callable[[PyTree, jax.Array], jax.Array]
    spec: PyTree
    weights: Weights
    tokenizer: TokenizerFiles | None
    context: int | None
    meta: Mapping[str, str | int | float]


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {'a/b/c': leaf}, in the dicts' own order."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def load_all(source: Source) -> PyTree:
    """The whole parameter tree in memory: for tests and small models only."""
    return unflatten({name: source.weights.read(name) for name in source.weights.names()})
