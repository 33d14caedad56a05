"""Prompts of a file: what a drafter learns from, and is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effc.errors import EffcError

if TYPE_CHECKING:
    from effc.passes.context import Context

LONGEST = 128
"""Tokens of a prompt; longer ones are left out."""

PROMPTS, READ = 4, 64
"""Windows of --calib that are measured on, where no prompts are given, and their tokens."""

ASKED = 8
"""Prompts of a file that are measured on."""


def prompts(context: Context, file: Path) -> list[list[int]]:
    """The lines of a file as prompts, in the chat template where there is one, in the order of the file."""
    tokenizer = context.tokenizer
    if tokenizer is None:
        raise EffcError(f"{context.name}: {file} needs a tokenizer, and the model has none")
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EffcError(f"{context.name}: {file}: {error}, want prompts, one a line") from None
    found = [tokenizer.encode(line) if tokenizer.chat_template is None else tokenizer.ask(line) for line in lines]
    short = [ids for ids in found if 0 < len(ids) <= LONGEST]
    if not short:
        raise EffcError(f"{context.name}: {file}: no prompt of 1 to {LONGEST} tokens, want some, one a line")
    return short


def measured_on(context: Context, file: Path | None) -> Sequence[list[int]]:
    """Prompts to measure drafting on: the last of the file, which are learned from last; else windows of --calib."""
    return prompts(context, file)[-ASKED:] if file else context.prompts(PROMPTS, READ).tolist()
