"""What a prompt loses by leaving early, in [0,1]: against the full model's text, or against a reference.

Sequences are token ids: no tokenizer's words, no case folding, so the numbers are those of the model's own units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

Tokens = Sequence[int]
Likeness = Callable[[Tokens, Tokens], float]
"""(one, other) -> 1 where equal, 0 where nothing is shared."""


def rouge_l(one: Tokens, other: Tokens) -> float:
    """F1 of the longest common subsequence."""
    return _f1(_common(one, other), one, other)


def token_f1(one: Tokens, other: Tokens) -> float:
    """F1 of the tokens as bags."""
    return _f1(sum((Counter(one) & Counter(other)).values()), one, other)


def agreement(one: Tokens, other: Tokens) -> float:
    """Share of positions with the same token; those only one of them has count as different."""
    longest = max(len(one), len(other))
    return sum(a == b for a, b in zip(one, other)) / longest if longest else 1.0


LIKENESS: dict[str, Likeness] = {"rouge_l": rouge_l, "token_f1": token_f1, "agreement": agreement}
"""By the word `calm{loss=...}` takes."""


def textual(early: Tokens, full: Tokens, likeness: Likeness = rouge_l) -> float:
    """1 - likeness to what the full model says: needs no reference."""
    return 1 - likeness(early, full)


def risk(early: Tokens, full: Tokens, reference: Tokens, likeness: Likeness = rouge_l) -> float:
    """How much worse than the full model against a reference; never below 0, so that it stays in [0,1]."""
    return max(0.0, (1 - likeness(early, reference)) - (1 - likeness(full, reference)))


def _f1(shared: int, one: Tokens, other: Tokens) -> float:
    return 2 * shared / (len(one) + len(other)) if one or other else 1.0


def _common(one: Tokens, other: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for a in one:
        above = 0
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], above + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]
