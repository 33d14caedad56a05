"""Where a prompt ends and a value begins, in token ids (algorithms 6.3-1).

A prompt is never tokenised again with what follows it: sampling continues after its ids, so log-probabilities
condition on them too. A value's ids are those of prompt and value tokenised together where these begin with the
prompt's ids; where a token would reach over the boundary (`import ` + `os`: ` os` is one token), they are the ids of
the value by itself, which is what a model that goes on from there can write. Either way they decode to the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from effc.errors import EffcError

_ANCHORS = ("", "\n", "a", ".")
"""Texts to put before a value: some tokenizers begin every text with a space of their own, which no anchor hides."""

_BACK = 8
"""Tokens of the prompt decoded with what follows: enough for a decoder to know that no text starts here."""


class Tokens(Protocol):
    """A tokenizer, as effc.frontend.tokenizer has it."""

    def encode(self, text: str, *, specials: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str: ...


def continued(tokenizer: Tokens, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ids after a prompt: a leading space may depend on what is before it."""
    before = list(prompt[-_BACK:])
    return tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]


def spelled(tokenizer: Tokens, prompt: str, ids: Sequence[int], value: str, where: str) -> tuple[int, ...]:
    """Ids of the value after a prompt of those ids."""
    joint = tokenizer.encode(prompt + value)
    if joint[: len(ids)] == list(ids):
        return tuple(joint[len(ids) :])
    for anchor in _ANCHORS:
        head = tokenizer.encode(anchor, specials=False)
        whole = tokenizer.encode(anchor + value, specials=False)
        tail = whole[len(head) :]
        if whole[: len(head)] == head and continued(tokenizer, ids, tail) == value:
            return tuple(tail)
    raise EffcError(f"{where}: the tokenizer cannot write {value[:40]!r} after {prompt[-20:]!r}, want another boundary")


def cut(tokenizer: Tokens, prompt: Sequence[int], ids: Sequence[int], stop: Sequence[str]) -> tuple[int, str]:
    """How many ids complete the first stop string (all of them where none does), and their text."""
    whole = continued(tokenizer, prompt, ids)
    if not found(whole, stop):
        return len(ids), whole
    texts = ((n, continued(tokenizer, prompt, ids[:n])) for n in range(1, len(ids) + 1))
    return next(((n, text) for n, text in texts if found(text, stop)), (len(ids), whole))


def found(text: str, stop: Sequence[str]) -> tuple[int, int] | None:
    """Where the first stop string begins and ends; of those that begin together the longest."""
    places = [(at, -len(one)) for one in stop if (at := text.find(one)) >= 0]
    if not places:
        return None
    at, length = min(places)
    return at, at - length
