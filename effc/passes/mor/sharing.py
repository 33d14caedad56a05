"""Which array each layer of a folded stack takes, and which layers an array begins from.

A stack of n layers becomes a map `order`: layer i takes array order[i], and there are max(order)+1 arrays.
Layers outside of the folded span keep an array of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from effc.passes.base import PassError

Share = Literal["cycle", "sequence", "middle-cycle", "middle-sequence"]
Init = Literal["auto", "stepwise", "even", "average", "lower", "upper"]


@dataclass(frozen=True)
class Folding:
    """`size` arrays serve the layers first..first+size*recursions-1 of `layers`, in cycles or each in a row."""

    layers: int
    first: int
    size: int
    recursions: int
    cycle: bool = True

    @property
    def last(self) -> int:
        """The layer after the span."""
        return self.first + self.size * self.recursions

    @property
    def unique(self) -> int:
        """Arrays left: those of the span and one for each layer outside of it."""
        return self.layers - self.size * (self.recursions - 1)

    def order(self) -> tuple[int, ...]:
        """For every layer the number of its array."""
        before = range(self.first)
        span = (self.first + self._base(i) for i in range(self.size * self.recursions))
        after = range(self.first + self.size, self.unique)
        return (*before, *span, *after)

    def sources(self, init: Init) -> tuple[tuple[int, ...], ...]:
        """For every array the layers that it is made of: one to copy, or several to average."""
        mine = _SOURCES[init](self)
        outside = [*range(self.first), *range(self.last, self.layers)]
        return (*((i,) for i in outside[: self.first]), *mine, *((i,) for i in outside[self.first :]))

    def again(self, layer: int) -> bool:
        """Whether an earlier layer takes the same array."""
        order = self.order()
        return order[layer] in order[:layer]

    def _base(self, layer: int) -> int:
        """Number within the shared arrays, of a layer counted from the span's first."""
        return layer % self.size if self.cycle else layer // self.recursions

    def _users(self) -> list[tuple[int, ...]]:
        """For every shared array the layers that take it."""
        span = range(self.size * self.recursions)
        return [tuple(self.first + i for i in span if self._base(i) == base) for base in range(self.size)]


def fold(layers: int, recursions: int, share: Share, span: tuple[int, int] | None, resample: bool = False) -> Folding:
    """The folding of a stack; span (first, last layer) overrides what `share` folds.

    PassError where the span does not divide into recursions, unless `resample`: then the last layers that
    are too many stay as they are.
    """
    middle = share.startswith("middle-")
    first, last = span or ((1, layers - 2) if middle else (0, layers - 1))
    count = last - first + 1
    if recursions < 2:
        raise PassError(f"mor: recursions={recursions}, want 2 or more")
    if not 0 <= first <= last < layers:
        raise PassError(f"mor: span={first}-{last}, want layers of 0 to {layers - 1}")
    if count < recursions:
        raise PassError(
            f"mor: {count} layer{'s' * (count != 1)} to fold into {recursions} recursions, want {recursions} or more"
        )
    if count % recursions and not resample:
        raise PassError(_uneven(first, last, recursions, layers))
    return Folding(layers, first, count // recursions, recursions, share.endswith("cycle"))


def _uneven(first: int, last: int, recursions: int, layers: int) -> str:
    count = last - first + 1
    rest = count % recursions
    return (
        f"mor: {count} layers ({first} to {last} of {layers}) do not divide into {recursions} recursions, want "
        f"span={first}-{last - rest}, another number of recursions, or uneven=true to leave {rest} as they are"
    )


def spans(layers: int, recursions: int, share: Share) -> list[tuple[int, int]]:
    """Every contiguous span as long as the one `share` folds, cut to whole recursions."""
    length = layers - 2 if share.startswith("middle-") else layers
    length -= length % recursions
    return [(first, first + length - 1) for first in range(layers - length + 1)]


def unique_parameters(folding: Folding, per_layer: int, own: int = 0) -> int:
    """Parameters of a folded stack: per_layer for each shared array, `own` for every layer (norms, deltas)."""
    return folding.unique * per_layer + folding.layers * own


def _stepwise(folding: Folding) -> list[tuple[int, ...]]:
    """Evenly spaced layers, the span's first and last among them."""
    first, last, size = folding.first, folding.last - 1, folding.size
    return [(_rounded(first, last, i, size - 1),) for i in range(size)]


def _rounded(first: int, last: int, i: int, steps: int) -> int:
    """The i-th of `steps`+1 evenly spaced whole numbers; halves go to the even one, as numpy rounds."""
    return first if not steps else round(first + i * (last - first) / steps)


def _even(folding: Folding) -> list[tuple[int, ...]]:
    """Evenly spaced between the layers outside of the span: what a model of as few layers would keep."""
    before, size = folding.first - 1, folding.size
    return [(_rounded(before, folding.last, i + 1, size + 1),) for i in range(size)]


def _average(folding: Folding) -> list[tuple[int, ...]]:
    return folding._users()


def _lower(folding: Folding) -> list[tuple[int, ...]]:
    return [(folding.first + i,) for i in range(folding.size)]


def _upper(folding: Folding) -> list[tuple[int, ...]]:
    return [(folding.last - folding.size + i,) for i in range(folding.size)]


_SOURCES = {"stepwise": _stepwise, "even": _even, "average": _average, "lower": _lower, "upper": _upper}


def chosen(init: Init, rank: int) -> Init:
    """What `auto` means: stepwise for layers that are tied, averages where deltas make up the difference."""
    if init != "auto":
        return init
    return "average" if rank else "stepwise"


def kept(layers: Sequence[int], count: int) -> list[int]:
    """`count` of the layers evenly spaced, first and last among them: what a shallower model keeps."""
    if count == 1:
        return [layers[0]]
    return [layers[_rounded(0, len(layers) - 1, i, count - 1)] for i in range(count)]
