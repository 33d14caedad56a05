"""Which layer of an artifact hurts: the divergence from the input model where only that layer is the artifact's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from effc.divergence import Reference
from effc.errors import EffcError, nearest
from effc.evaluate import Windows
from effc.ir.core import Module
from effc.ir.stream import params_of, weight
from effc.ir.types import NUMPY, Quant
from effc.opened import Opened
from effc.runtime.qarray import QArray
from effc.weights import Array, Arrays, Lazy, Store

Places = frozenset[tuple[str, int]]
"""Parameters and numbers of their arrays."""


@dataclass(frozen=True)
class Part:
    """A layer or a parameter, and nats a token where it alone is the artifact's."""

    name: str
    kl: float


@dataclass(frozen=True)
class Bisection:
    """Parts in the model's order, and the whole artifact."""

    text: str
    whole: float
    layers: list[Part]
    params: list[Part]
    notes: list[str]

    @property
    def worst(self) -> Part:
        """The layer, or what is outside of all layers, that hurts most."""
        return max(self.layers, key=lambda part: part.kl)

    def json(self) -> dict[str, Any]:
        rows = {
            name: {p.name: p.kl for p in parts} for name, parts in (("layers", self.layers), ("params", self.params))
        }
        return {"text": self.text, "kl": self.whole, "worst": self.worst.name, **rows, "notes": self.notes}

    def table(self) -> Table:
        """A rich renderable."""
        caption = [f"{self.worst.name} hurts most", f"the whole artifact: {self.whole:.5f}", f"on {self.text}"]
        table = Table(caption="\n".join([*caption, *self.notes]), caption_justify="left")
        table.add_column("only this is the artifact's")
        table.add_column("KL, nats a token", justify="right")
        table.add_column("share", justify="right")
        for parts in (self.layers, self.params):
            total = sum(part.kl for part in parts) or 1.0
            for part in parts:
                table.add_row(part.name, f"{part.kl:.6f}", f"{part.kl / total:.1%}")
            table.add_section()
        return table


def bisect(model: Opened, other: Opened, text: Windows, console: Console | None = None) -> Bisection:
    """Every layer and every parameter of `model` alone in `other`; EffcError where they are not alike."""
    _check_alike(model, other)
    moved = _moved(model, other)
    layers, params = dict(_layers(model.module)), {} if moved else dict(_params(model.module))
    notes = [f"{moved[0]} and others changed too, so parameters are not taken one by one"] if moved else []
    with (
        tempfile.TemporaryDirectory(prefix="effc-") as folder,
        Progress(console=console, transient=True, disable=console is None) as bar,
    ):
        task = bar.add_task("bisect", total=len(layers) + len(params) + 2)
        reference = Reference((other.module, other.store), text, Path(folder))
        bar.advance(task)

        def apart(places: Places) -> float:
            bar.advance(task)
            return reference.divergence((other.module, _hybrid(model, other, places)))

        def parts(of: Mapping[str, Places]) -> list[Part]:
            return [Part(name, apart(places)) for name, places in of.items()]

        whole = apart(frozenset[tuple[str, int]]().union(*layers.values()))
        found = parts(layers), parts(params)
    return Bisection(f"{text.scored} tokens of {text.source}", whole, *found, notes)


def _check_alike(model: Opened, other: Opened) -> None:
    mine, wanted = model.module.params, other.module.params
    for name in wanted:
        if name not in mine:
            raise EffcError(f"{model.path}: no parameter '{name}' of {other.path}{nearest(name, mine)}: {_WANT}")
        same = (mine[name].stack, mine[name].type.shape) == (wanted[name].stack, wanted[name].type.shape)
        if not same:
            raise EffcError(
                f"{model.path}: '{name}' is {mine[name].type}, {other.path} has {wanted[name].type}: {_WANT}"
            )
        if isinstance(wanted[name].type.dtype, Quant):
            raise EffcError(f"{other.path}: '{name}' is {wanted[name].type.dtype}, want the model before quantization")


_WANT = "want the same parameters, coded (without fuse, mor ...)"


def _moved(model: Opened, other: Opened) -> list[str]:
    """Dense parameters that are not the same: scales were folded, one parameter alone means nothing."""
    dense = [n for n, p in model.module.params.items() if not isinstance(p.type.dtype, Quant) and n in other.store]
    return [n for n in dense if any(not _same(model.store[n], other.store[n], i) for i in range(_count(model, n)))]


def _count(model: Opened, name: str) -> int:
    return model.module.params[name].count


def _same(one: Lazy, two: Lazy, layer: int) -> bool:
    return np.array_equal(one.read(layer)[""], two.read(layer)[""])


def _layers(module: Module) -> Iterator[tuple[str, Places]]:
    """Arrays of each run of a block, then what is outside."""
    inside: set[str] = set()
    for func in module.funcs.values():
        names = [name for name in params_of(func.ops) if module.params[name].stack and name not in inside]
        inside |= set(names)
        for layer in range(max((module.params[name].stack for name in names), default=0)):
            yield f"@{func.name}[{layer}]", frozenset((n, layer) for n in names if layer < module.params[n].stack)
    rest = frozenset((name, i) for name, p in module.params.items() if name not in inside for i in range(p.count))
    if rest:
        yield "outside of layers", rest


def _params(module: Module) -> Iterator[tuple[str, Places]]:
    for name, param in module.params.items():
        if isinstance(param.type.dtype, Quant):
            yield f"@{name}", frozenset((name, i) for i in range(param.count))


def _hybrid(model: Opened, other: Opened, places: Places) -> Store:
    """The other model's arrays, but at these places what the artifact's stand for."""
    names = {name for name, _ in places if name in other.module.params}
    made = [Lazy(other.module.params[n], _reader(model.store[n], other.store[n], n, places)) for n in names]
    return other.store.replace(made, other.module)


def _reader(mine: Lazy, theirs: Lazy, name: str, places: Places) -> Callable[[int], Arrays]:
    def read(layer: int) -> Mapping[str, Array]:
        if (name, layer) not in places:
            return theirs.read(layer)
        value = weight(mine, layer)
        plain = value.dequantize() if isinstance(value, QArray) else value
        dtype = theirs.param.type.dtype
        assert isinstance(dtype, str)
        return {"": np.asarray(plain).astype(NUMPY[dtype])}

    return read
