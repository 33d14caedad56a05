"""A native region as a list of ops over scratch memory, and its words as program.h reads them.

Ops that act on each row by itself run in row stages, one after another on the same rows; products and
attention run in stages of independent ops between these. An op's stage is the first that its operands allow.
Ops of a branch are in stages of their own, which run only where the branch's flag is as they want it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

NORM, QUANTIZE, ROPE, APPEND, MAP, ARGMAX, LINEAR, ATTENTION, DECIDE, SURE, SELECT, DENSE, JOIN = range(1, 14)
PRODUCT, COUNT, EMBED, TURNS = 14, 15, 16, 17

WORTH = frozenset({LINEAR, PRODUCT})
"""Ops for which a call is made: they read weights, and take most of a program's time."""

HEADER = 5
"""Words before the first stage: a key of what follows it, all words, stages, bytes of scratch memory, flags."""

_ALIGN = 64


@dataclass(frozen=True)
class Branch:
    """Runs where this flag is 1 (or 0), not before stage `start`."""

    flag: int
    wanted: int
    start: int = 0


ALWAYS = Branch(-1, 0)


@dataclass(eq=False)
class Slot:
    """Memory of a value: scratch, or a buffer of the call (`buffer`: ("in" or "out", number))."""

    size: int
    dtype: str = "float32"
    shape: tuple[int, ...] | None = None
    stage: int = -1  # that writes it
    rows: int = 0
    branch: Branch = ALWAYS
    buffer: tuple[str, int] | None = None
    offset: int = 0


@dataclass(frozen=True)
class Place:
    """rows x width numbers of 4 bytes in a slot, `stride` numbers from row to row, from byte `offset` on."""

    slot: Slot
    rows: int
    width: int
    stride: int
    offset: int = 0

    def reshaped(self, rows: int, width: int) -> Place | None:
        """The same numbers in other rows; None where they do not lie so."""
        if (rows, width) == (self.rows, self.width):
            return self
        if self.stride != self.width and self.rows > 1:
            return None
        return Place(self.slot, rows, width, width, self.offset)

    def columns(self, start: int, stop: int) -> Place:
        """Some of each row."""
        return Place(self.slot, self.rows, stop - start, self.stride, self.offset + 4 * start)


@dataclass(eq=False)
class Op:
    """words: ints, and for arrays places (views) or slots (references); None is no array."""

    code: int
    words: Sequence[Any]
    reads: Sequence[Slot]
    writes: Slot
    rows: int = 0
    stage: int = 0
    branch: Branch = ALWAYS


NOWHERE = Slot(0)
"""Stands for an array that is not there."""


@dataclass
class Program:
    """Ops in order, arrays that go in, slots that come out."""

    ops: list[Op] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)
    aliases: dict[int, int] = field(default_factory=dict)
    branch: Branch = ALWAYS  # that ops are added to
    flags: int = 0
    _known: dict[int, Slot] = field(default_factory=dict)

    def copy(self) -> Program:
        """What is added to either is not added to the other; slots are shared."""
        ops, known = list(self.ops), dict(self._known)
        return replace(
            self, ops=ops, inputs=[*self.inputs], outputs=[*self.outputs], aliases={**self.aliases}, _known=known
        )

    def input(self, array: Any) -> Slot:
        """The slot of an array that goes in."""
        if id(array) not in self._known:
            self._known[id(array)] = Slot(0, buffer=("in", len(self.inputs)))
            self.inputs.append(array)
        return self._known[id(array)]

    def output(self, slot: Slot) -> int:
        """The number of a slot among those that come out."""
        if slot.buffer is None:
            slot.buffer = ("out", len(self.outputs))
            self.outputs.append(slot)
        return slot.buffer[1]

    def takes(self, array: Any) -> bool:
        """Whether an array goes in already."""
        return id(array) in self._known

    def update(self, array: Any) -> Slot:
        """The slot of an array that goes in and comes out changed in place."""
        number = self.input(array).buffer
        assert number is not None
        slot = Slot(array.size * array.dtype.itemsize, array.dtype.name, array.shape)
        self.aliases[number[1]] = self.output(slot)
        return slot

    def by_rows(self, code: int, words: Sequence[Any], reads: Sequence[Slot], writes: Slot, rows: int) -> None:
        """An op on each row by itself."""
        stage = self.branch.start
        for slot in reads:
            together = slot.rows == rows and slot.branch == self.branch
            wait = 1 if slot.stage % 2 else 0 if together else 2
            stage = max(stage, slot.stage + wait if slot.stage >= 0 else 0)
        self._add(Op(code, words, reads, writes, rows, stage, self.branch))

    def together(self, code: int, words: Sequence[Any], reads: Sequence[Slot], writes: Slot) -> None:
        """An op whose tasks threads share."""
        after = [slot.stage + (2 if slot.stage % 2 else 1) for slot in reads if slot.stage >= 0]
        self._add(Op(code, words, reads, writes, 0, max([self.branch.start + 1, *after]), self.branch))

    def decide(self, place: Place) -> tuple[Branch, Branch]:
        """What runs where some row's first number is 0, and what runs where none is."""
        flag, self.flags = self.flags, self.flags + 1
        decided = Slot(0)
        self.together(DECIDE, [place, place.rows, flag], [place.slot], decided)
        return Branch(flag, 0, decided.stage + 1), Branch(flag, 1, decided.stage + 1)

    def _add(self, op: Op) -> None:
        slot = op.writes  # those that both sides of a branch write are ready after the later
        slot.stage, slot.rows, slot.branch = max(slot.stage, op.stage), op.rows, op.branch
        self.ops.append(op)

    def words(self) -> np.ndarray:
        """The program as integers, scratch memory dealt out."""
        stages = self._stages()
        scratch = _deal(stages)
        body = [self._stage(ops) for ops in stages]
        count = HEADER + sum(map(len, body))
        flat = np.array([0, count, len(stages), scratch, self.flags, *(w for words in body for w in words)], np.int64)
        flat[0] = int.from_bytes(hashlib.blake2b(flat[1:].tobytes(), digest_size=8).digest(), "little", signed=True)
        return flat

    def _stages(self) -> list[list[Op]]:
        groups: dict[tuple[int, int, Branch], list[Op]] = {}
        for op in self.ops:
            groups.setdefault((op.stage, op.rows, op.branch), []).append(op)
        return [groups[key] for key in sorted(groups, key=lambda key: key[0])]

    def _stage(self, ops: list[Op]) -> list[int]:
        encoded = [self._op(op) for op in ops]
        size, branch = 5 + sum(map(len, encoded)), ops[0].branch
        return [size, ops[0].rows, len(ops), branch.flag, branch.wanted, *(word for words in encoded for word in words)]

    def _op(self, op: Op) -> list[int]:
        words = [word for item in op.words for word in self._item(item)]
        return [op.code, len(words) + 2, *words]

    def _item(self, item: Any) -> list[int]:
        match item:
            case Place():
                base, offset = self._reference(item.slot)
                return [base, offset + item.offset, item.stride]
            case Slot():
                return self._reference(item)
            case float():
                return list(struct.unpack("<q", struct.pack("<d", item)))
            case _:
                return [int(item)]

    def _reference(self, slot: Slot) -> list[int]:
        if slot is NOWHERE:
            return [-2, 0]
        if slot.buffer is None:
            return [-1, slot.offset]
        side, number = slot.buffer
        return [number + (len(self.inputs) if side == "out" else 0), 0]


def _deal(stages: list[list[Op]]) -> int:
    """Gives scratch slots their offsets: memory is used again when the last stage that reads it is done."""
    last: dict[int, int] = {}
    for i, ops in enumerate(stages):
        for op in ops:
            for slot in (*op.reads, op.writes):
                last[id(slot)] = i
    free: list[tuple[int, int]] = []  # (start, end), in order; what is past `top` is free too
    top = 0
    ending: dict[int, list[Slot]] = {}
    dealt: set[int] = set()
    for i, ops in enumerate(stages):
        for op in ops:
            slot = op.writes
            if slot.buffer is None and id(slot) not in dealt:
                dealt.add(id(slot))
                top = _place(slot, free, top)
                ending.setdefault(last[id(slot)], []).append(slot)
        for slot in ending.get(i, ()):
            _release(free, slot.offset, slot.offset + _round(slot.size))
    return max(top, _ALIGN)


def _round(size: int) -> int:
    # Vectors may be read past a row's end.
    return -(-(size + _ALIGN) // _ALIGN) * _ALIGN


def _place(slot: Slot, free: list[tuple[int, int]], top: int) -> int:
    """Where the slot fits first; the new top."""
    size = _round(slot.size)
    for i, (start, end) in enumerate(free):
        if end - start >= size:
            slot.offset = start
            free[i : i + 1] = [(start + size, end)] if end - start > size else []
            return top
    slot.offset = top
    return top + size


def _release(free: list[tuple[int, int]], start: int, end: int) -> None:
    """Adds a stretch to the free ones, joined with its neighbours."""
    free.append((start, end))
    free.sort()
    joined: list[tuple[int, int]] = []
    for piece in free:
        if joined and joined[-1][1] == piece[0]:
            joined[-1] = (joined[-1][0], piece[1])
        else:
            joined.append(piece)
    free[:] = joined
