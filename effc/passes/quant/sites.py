"""Where a scale per channel can move: out of the input of some linears, into the norm or linear that makes it.

    y = norm(x) * g;  y @ w   ->   norm(x) * (g / s);  y @ (s * w)
    v = z @ u;  mix(v) @ w    ->   z @ (u / s);        mix(v) @ (s * w)

for every s > 0, where `mix` treats channels alike: a product with another value, attention over v. Exact but
for rounding, and found on dataflow alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from effc.ir.core import Func, Module, Op, param_uses, walk
from effc.ir.ops import attribute
from effc.ir.rewrite import producers, users
from effc.ir.types import Quant
from effc.passes.base import Notes
from effc.weights import Array, Arrays, Lazy, Store


@dataclass(frozen=True)
class Site:
    """A value, the linears that are all that reads it, and the op whose parameters can take a scale."""

    func: str
    value: str
    source: Op
    readers: tuple[Op, ...]
    index: tuple[int, ...]
    """The channel of the source that each channel of the value comes from."""

    @property
    def channels(self) -> int:
        """Of the source."""
        return max(self.index) + 1

    @property
    def name(self) -> str:
        """For notes: the parameter that takes the scale."""
        return self.source.params["scale" if self.source.kind == "norm" else "w"]


Scales = Callable[[Site, int], Array]
"""s f64[channels of the source] for a site and the number of its arrays."""


def sites(module: Module, notes: Notes) -> list[Site]:
    """All of the module; what comes near, with the reason, to `notes`."""
    counts = {name: len(uses) for name, uses in param_uses(module).items()}
    out: list[Site] = []
    for func in module.funcs.values():
        for site in _sites(func):
            why = _why_not(module, site, counts)
            notes.skip(f"scale of {site.name}", why) if why else out.append(site)
    return out


def _sites(func: Func) -> Iterator[Site]:
    read, made = users(func), producers(func)
    inside = {name for op in walk(func) for region in op.regions.values() for name in region.results}
    for value, readers in read.items():
        if not readers or any(op.kind != "linear" for op in readers) or value in func.results or value in inside:
            continue
        found = _source(value, made, read, func)
        if found:
            yield Site(func.name, value, found[0], tuple(readers), found[1])


def _source(
    value: str, made: Mapping[str, Op], read: Mapping[str, list[Op]], func: Func
) -> tuple[Op, tuple[int, ...]] | None:
    """The op that can take a scale of `value`, and which of its channels each channel comes from."""
    op = made.get(value)
    if op is None or not isinstance(width := func.types()[value].shape[-1], int):
        return None
    if (op.kind == "norm" and "scale" in op.params) or op.kind == "linear":
        return op, tuple(range(width))

    def alone(name: str) -> bool:
        return len(read.get(name, ())) == 1 and name not in func.results

    if op.kind == "lax.mul":
        for name in op.inputs:
            factor = made.get(name)
            if factor and factor.kind == "linear" and alone(name) and factor.out.type.shape == op.out.type.shape:
                return factor, tuple(range(width))
    return _through_attention(op, made, alone)


def _through_attention(
    op: Op, made: Mapping[str, Op], alone: Callable[[str], bool]
) -> tuple[Op, tuple[int, ...]] | None:
    """o <- reshape <- attention <- reshape <- v: several query heads share a key head's channels."""
    mix = made.get(op.inputs[0]) if op.kind == "lax.reshape" else None
    if mix is None or mix.kind != "attention" or not alone(mix.out.name) or mix.inputs.count(mix.inputs[2]) != 1:
        return None
    heads = made.get(mix.inputs[2])
    v = made.get(heads.inputs[0]) if heads and heads.kind == "lax.reshape" and alone(heads.out.name) else None
    if v is None or heads is None or v.kind != "linear" or not alone(v.out.name):
        return None
    (h, d), g = mix.out.type.shape[2:], heads.out.type.shape[2]
    if not (isinstance(h, int) and isinstance(d, int) and isinstance(g, int)):
        return None
    if v.out.type.shape[-1] != g * d or op.out.type.shape[-1] != h * d:
        return None
    return v, tuple(head * g // h * d + at for head in range(h) for at in range(d))


def _why_not(module: Module, site: Site, counts: Mapping[str, int]) -> str:
    names = [name for op in (site.source, *site.readers) for name in op.params.values()]
    for name in names:
        if counts[name] > 1:
            return f"{name} is read by other ops too"
        if isinstance(module.params[name].type.dtype, Quant):
            return f"{name} is {module.params[name].type.dtype}: scaling it would not be exact"
    stacks = {module.params[name].stack for name in names}
    return "" if len(stacks) == 1 else "some of its arrays serve several layers"


# ---- arrays


@dataclass(frozen=True)
class Folded:
    """Arrays with the scales of sites folded in; of those a site touches, as f32."""

    store: Store
    sites: tuple[Site, ...]
    scales: Scales

    def changed(self) -> list[str]:
        """Parameters that a site touches."""
        touched = [n for s in self.sites for n in (*s.source.params.values(), *(op.params["w"] for op in s.readers))]
        return list(dict.fromkeys(touched))

    def read(self, name: str, layer: int) -> Array:
        """An array after folding, in f32; products in f64."""
        array = self.store[name].read(layer)[""]
        if name not in self.changed():
            return np.asarray(array, np.float32)
        wide = np.asarray(array, np.float64)
        for site in self.sites:
            wide = self._taken(site, name, layer, wide)
            for op in site.readers:
                if op.params["w"] == name:
                    s = self.factor(site, layer)
                    wide = wide * (s[:, None] if _kn(op) else s[None])
        return wide.astype(np.float32)

    def factor(self, site: Site, layer: int) -> Array:
        """What each channel of the value is multiplied with in its readers."""
        return self.scales(site, layer)[list(site.index)]

    def _taken(self, site: Site, name: str, layer: int, array: Array) -> Array:
        roles = [role for role, param in site.source.params.items() if param == name]
        if not roles:
            return array
        s = self.scales(site, layer)
        if site.source.kind == "norm":
            offset = float(str(attribute(site.source, "offset"))) if roles[0] == "scale" else 0.0
            return (array + offset) / s - offset
        return array / (s[:, None] if roles[0] == "w" and not _kn(site.source) else s)

    def made(self, module: Module) -> list[Lazy]:
        """Every parameter that changes, in the types of `module`."""
        return [Lazy(module.params[name], self._reader(module, name)) for name in self.changed()]

    def _reader(self, module: Module, name: str) -> Callable[[int], Arrays]:
        return lambda layer: {"": self.read(name, layer).astype(self.store[name].read(layer)[""].dtype)}


def _kn(op: Op) -> bool:
    return attribute(op, "layout") == "kn"
