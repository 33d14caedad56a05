"""The text that weights are fitted to: of --calib, or a sample that every machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from effc.errors import EffcError
from effc.ir.core import Module
from effc.weights import Array

if TYPE_CHECKING:
    from effc.passes.context import Context

WINDOW = 512
SAMPLE = 40
"""Characters of the sample that surely hold a token."""


def calibration_tokens(module: Module, context: Context, tokens: int) -> tuple[list[Array], str]:
    """About so many token ids in windows i32[1,n], and what text they are of."""
    known = module.meta.get("context")
    window = min(WINDOW, known) if isinstance(known, int) and known > 0 else WINDOW
    ids, source = _ids(context, tokens)
    if ids is None:
        count = max(1, tokens // min(window, context.window))
        return [row[None] for row in context.prompts(count, min(window, context.window))], source
    body = min(window - len(context.head), len(ids))
    if body < 2:
        raise EffcError(f"{context.name}: {len(ids)} tokens of {source}, want 2 or more to fit weights to")
    return [
        np.asarray([[*context.head, *ids[at : at + body]]], np.int32) for at in _starts(len(ids), body, tokens)
    ], source


def _ids(context: Context, tokens: int) -> tuple[Array | None, str]:
    if context.calib is not None:
        return context.ids, "--calib"
    if context.tokenizer is None:
        return None, "the model's own samples"
    from effc.evaluate import default_text

    text, name = default_text()  # evaluation takes its beginning
    return np.asarray(context.tokenizer.rust.encode(text[-SAMPLE * tokens :], add_special_tokens=False).ids), (
        f"the end of {name}"
    )


def _starts(have: int, body: int, tokens: int) -> list[int]:
    """Of windows spread over the text, without overlap."""
    count = max(1, min(tokens // body, have // body))
    return [(have - body) * i // max(count - 1, 1) for i in range(count)] if count > 1 else [0]
