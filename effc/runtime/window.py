"""Ops with no incremental rule: run over all tokens so far, keep the rows of this call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from effc.runtime.cache import Step


def window(step: Step, body: Callable[..., Any], *values: jax.Array) -> Any:
    """body(*values) for values [b,t,...] of the new tokens, as if it saw those of every token.

    body takes arrays [b,S,...] that start at position 0 and must be causal: rows past a sequence's
    length hold anything finite. Costs O(S) a call.
    """
    full = step.append(*values)
    if not step.cached:
        return body(*full)
    return jax.tree.map(step.rows, body(*full))
