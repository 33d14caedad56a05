"""What earlier tokens leave behind: keys and values of every attention op, and a length a sequence.

`Step` is one call's view of a cache. It lives while one call is traced: ops take their entries in the
order they run, which is the same in every call, so entries are a plain list, one a run of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from effc.runtime import coded
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.region.record import recorded

EXACT = "exact"
"""Kind of the rows that are never kept narrower than they are."""


@partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("heads", "kind"))
@dataclass(frozen=True)
class Rows:
    """Values of all tokens so far; rows at and past a sequence's length mean nothing.

    Where heads is g > 0 values are [b*g,S,d], for [b,S,g,d]: products with keys then read the array
    that is updated in place as it is (a reshape between makes XLA copy it). Else [b,S,...].
    kind: what the program asks for, one of coded.KINDS, or EXACT; `float` may be kept narrower.
    A value may be a `coded.Split`, whose arrays are [b*g,S,...] too.
    """

    values: tuple[Any, ...]
    heads: tuple[int, ...]
    kind: str = "float"

    @staticmethod
    def of(values: Sequence[jax.Array], kind: str) -> Rows:
        """Values [b,t,...] as they are kept; keys and values of attention come first."""
        heads = tuple(value.shape[2] if value.ndim == 4 else 0 for value in values)
        return Rows(_coded(tuple(map(inner, values)), heads, kind), heads, kind)

    def all(self) -> tuple[Any, ...]:
        """Each as [b,S,...]; a `coded.Split` as it is, for attention to read."""
        return tuple(_whole(value, g) for value, g in zip(self.values, self.heads, strict=True))

    def empty(self, capacity: int) -> Rows:
        """Zeros with room for `capacity` tokens a sequence."""
        values = jax.tree.map(lambda x: jnp.zeros((x.shape[0], capacity, *x.shape[2:]), x.dtype), self.values)
        return replace(self, values=values)

    def kept_as(self, kind: str) -> Rows:
        """The same where the program leaves it open how keys and values are kept."""
        if self.kind != "float" or kind == "float" or any(x.dtype != jnp.float32 for x in self.values[:2]):
            return self
        return replace(self, values=_coded(self.values, self.heads, kind), kind=kind)


def _whole(value: Any, heads: int) -> Any:
    return held(value, heads=heads) if heads and not isinstance(value, coded.Split) else value


def _coded(values: Sequence[jax.Array], heads: Sequence[int], kind: str) -> tuple[Any, ...]:
    """Keys and values, which come first, as stored; what has no heads as it is."""
    if kind == EXACT:
        return tuple(values)
    return (*(_stored(x, kind) if g else x for x, g in zip(values[:2], heads)), *values[2:])


def _stored(x: jax.Array, kind: str) -> Any:
    """Of x[b*g,S,d]."""
    return coded.Split.of(x) if kind == "i8" and on_tpu.wanted() else coded.encode(x, kind)


class Entry(Protocol):
    """What an op, or a group of them, keeps of earlier tokens."""

    def empty(self, capacity: int) -> Any:
        """The same, with nothing in it and room for `capacity` tokens a sequence."""
        ...

    def kept_as(self, kind: str) -> Any:
        """The same, its keys and values kept as that kind where the program leaves that open."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """lengths i32[b]: tokens each sequence holds; entries: one `Rows` an op that looks back, the first among them."""

    lengths: jax.Array
    entries: tuple[Any, ...]

    @property
    def capacity(self) -> int:
        """Tokens there is room for in each sequence."""
        return self.entries[0].values[0].shape[1] if self.entries else 2**31 - 1


def inner(value: jax.Array) -> jax.Array:
    """[b,t,g,d] as stored; other ranks as they are."""
    if value.ndim != 4:
        return value
    b, t, g, d = value.shape
    return value.swapaxes(1, 2).reshape(b * g, t, d)


@recorded
def held(stored: jax.Array, *, heads: int) -> jax.Array:
    """[b,S,g,d] of a stored value by head; floats as they are stored."""
    rows, S = stored.shape[:2]
    return coded.decode(stored.reshape(rows // heads, heads, S, -1).swapaxes(1, 2))


class Step:
    """One call: t new tokens of each sequence after those in the cache (none: from the start).

    valid i32[b] says how many of the t are tokens, the rest being padding on the right: lengths grow
    by that much and `last` keeps one row a sequence. Rows that padding leaves are overwritten later.
    """

    def __init__(
        self, tokens: jax.Array, cache: Cache | None = None, valid: jax.Array | None = None,
        positions: jax.Array | None = None,
    ):  # fmt: skip
        self._batch, self._count = tokens.shape[:2]
        self._before, self._valid, self._after = cache, valid, list[Any]()
        self.lengths = jnp.zeros(self._batch, jnp.int32) if cache is None else cache.lengths
        counts = jnp.arange(self._count, dtype=jnp.int32)
        self.positions = self.lengths[:, None] + counts[None, :] if positions is None else positions
        self._narrow = False

    def asked(self) -> Step:
        """The same call, whose `wanted` rows are the `last` ones."""
        other = copy(self)
        other._narrow = True
        return other

    def wanted(self, x: jax.Array) -> jax.Array:
        """Of x[b,t,...] the rows that something is to be made of, where all have been kept: all, or the last."""
        return self.last(x) if self._narrow else x

    def append(self, *values: jax.Array, cache: str = "float") -> tuple[jax.Array, ...]:
        """Each [b,t,...] after the rows kept so far, [b,S,...]; keys and values first, kept as `cache` says."""
        if self._before is None:
            rows = Rows.of(values, cache)
        else:
            rows = self._before.entries[len(self._after)]
            rows = replace(rows, values=_all_grown(rows.values, values, self.lengths))
        self._after.append(rows)
        return rows.all()

    def previous(self) -> tuple[jax.Array, ...] | None:
        """The last row of each sequence, [b,...], of what the next `append` appends to; None without a cache.

        Means nothing for a sequence of no tokens.
        """
        if self._before is None:
            return None
        full = self._before.entries[len(self._after)].all()
        index = jnp.maximum(self.lengths - 1, 0)
        pick = jax.vmap(lambda rows, at: lax.dynamic_index_in_dim(rows, at, keepdims=False))
        return tuple(pick(x, index) for x in full)

    @property
    def taken(self) -> int:
        """How many entries this call has grown so far."""
        return len(self._after)

    def ahead(self, count: int) -> tuple[Any, ...]:
        """The next `count` entries as they were before this call."""
        assert self._before is not None
        return self._before.entries[self.taken : self.taken + count]

    def put(self, grown: Sequence[Entry]) -> None:
        """Entries that a step of their own has grown."""
        self._after.extend(grown)

    def grown(self, first: int) -> tuple[Any, ...]:
        """Entries from number `first` on as they are after this call."""
        return tuple(self._after[first:])

    def tokens(self) -> jax.Array:
        """bool[b,t]: which are tokens and not padding."""
        if self._valid is None:
            return jnp.ones((self._batch, self._count), bool)
        return jnp.arange(self._count)[None] < self._valid[:, None]

    def last(self, x: jax.Array) -> jax.Array:
        """[b,1,...]: the row of the last valid token; x[b,t,...] itself when all are valid, or that is all it has."""
        if self._valid is None or x.shape[1] < self._count or self._count == 1:
            return x
        index = jnp.maximum(self._valid - 1, 0).reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.take_along_axis(x, index, axis=1)

    @property
    def cached(self) -> bool:
        """Whether there were rows before this call."""
        return self._before is not None

    def rows(self, x: jax.Array) -> jax.Array:
        """[b,t,...]: the rows of this call's tokens out of x[b,S,...]."""
        index = self.positions.reshape(self.positions.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1, mode="clip")

    def cache(self) -> Cache:
        """The cache after this call."""
        grown = self._count if self._valid is None else self._valid
        return Cache(self.lengths + grown, tuple(self._after))


def _all_grown(olds: Sequence[Any], news: Sequence[jax.Array], lengths: jax.Array) -> tuple[Any, ...]:
    """Of one op that looks back."""
    if not on_tpu.wanted():
        return tuple(_grown(old, new, lengths) for old, new in zip(olds, news, strict=True))
    from effc.runtime.kernels.attention import choice  # Pallas takes half a second to import

    return choice.append(write, olds, tuple(map(_alike, olds, news)), lengths)


def _alike(old: Any, new: jax.Array) -> jax.Array:
    """new[b,t,...] as `old` keeps it; for a Split, which is made of it where it is written, floats."""
    if isinstance(old, coded.Split):
        return inner(new)
    return coded.encode(inner(new), coded.kind_of(old)) if new.ndim == 4 else new.astype(old.dtype)


def _grown(old: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """As `append`; what is not by head is no layer that native regions know."""
    return append(old, new, lengths) if new.ndim == 4 else write(old, new, lengths)


@recorded
def append(old: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """`old` [b*g,S,m] with rows `new` [b,t,g,d], as `old` keeps them, of sequence i from row lengths[i] on."""
    return write(old, coded.encode(inner(new), coded.kind_of(old)), lengths)


def write(old: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """`old` with sequence i of `new` written at row lengths[i], in place where donated."""
    new, sequences = new.astype(old.dtype), lengths.shape[0]
    each, rest = old.shape[0] // sequences, (0,) * (old.ndim - 2)
    for i in range(sequences):
        part = lax.slice_in_dim(new, i * each, (i + 1) * each)
        old = lax.dynamic_update_slice(old, part, (i * each, lengths[i], *rest))
    return old


def cache_shapes(extend: Callable[..., Any], params: Any, batch: int) -> Cache:
    """Shapes of a cache for `extend(params, tokens, cache)`, read off one abstract call; a row a sequence."""
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    return jax.eval_shape(lambda p, x: extend(p, x)[1], params, tokens)


def kept_as(shapes: Cache, kind: str) -> Cache:
    """Shapes of the same cache, keys and values as `kind` where the program leaves that open."""
    return jax.eval_shape(lambda cache: replace(cache, entries=tuple(e.kept_as(kind) for e in cache.entries)), shapes)


def empty_cache(shapes: Cache, capacity: int) -> Cache:
    """A cache of zeros with room for `capacity` tokens a sequence."""
    entries = tuple(entry.empty(capacity) for entry in shapes.entries)
    return Cache(jnp.zeros(shapes.lengths.shape, jnp.int32), entries)
