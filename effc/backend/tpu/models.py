"""Sizes of known models, and the calls of kernels that they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """d of a model, heads and their width, key/value heads, hidden width, tokens, layers; window 0: all keys."""

    width: int
    heads: int
    groups: int
    head: int
    hidden: int
    vocab: int
    layers: int
    window: int = 0

    def linears(self, *, joined: bool = False) -> dict[str, tuple[int, int]]:
        """[K,N] of a layer's linears; joined: those that read one value are one, as `fuse` leaves them."""
        q, kv = self.heads * self.head, self.groups * self.head
        shapes = {"o": (q, self.width), "down": (self.hidden, self.width)}
        if joined:
            return {"qkv": (self.width, q + 2 * kv), "gateup": (self.width, 2 * self.hidden), **shapes}
        return {"q": (self.width, q), "kv": (self.width, kv), "gate": (self.width, self.hidden), **shapes}


MODELS = {
    "smollm2-135m": Sizes(576, 9, 3, 64, 1536, 49152, 30),
    "llama-3-8b": Sizes(4096, 32, 8, 128, 14336, 128256, 32),
    "gemma-3-4b": Sizes(2560, 8, 4, 256, 10240, 262208, 34, window=1024),
}


@dataclass(frozen=True)
class Case:
    """A call of a kernel: what it is for, which kernel, and its numbers."""

    title: str
    kind: str
    numbers: dict[str, Any]


def cases(model: str, *, rows: int, group: int = 128, joined: bool = False, context: int = 2048) -> Iterator[Case]:
    """Of one step that decodes a token of each of `rows` sequences."""
    m = MODELS[model]
    for name, (extent, width) in m.linears(joined=joined).items():
        numbers = {"rows": rows, "extent": extent, "width": width, "group": group}
        yield Case(f"{model} {name}", "matmul", numbers)
    heads = {"batch": rows, "groups": m.groups, "head": m.head, "context": context, "tokens": 1}
    yield Case(f"{model} attention", "attention", {**heads, "heads": m.heads, "window": m.window})
    yield Case(f"{model} append", "append", heads)
    yield Case(f"{model} vocabulary", "vocabulary", {"rows": rows, "extent": m.width, "vocab": m.vocab})
    yield Case(f"{model} lookup", "lookup", {"rows": rows, "vocab": m.vocab, "extent": m.width})
    yield Case(f"{model} acceptance", "acceptance", {"rows": rows, "vocab": m.vocab})
