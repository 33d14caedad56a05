"""A runnable model: the `extend` function of an emitted program, its parameter table, its limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from effc.runtime.cache import Cache

Extend = Callable[..., tuple[jax.Array, Cache]]
"""extend(params, tokens i32[b,t], cache=None, valid=None) -> (logits [b,t,V], cache)."""

Table = Mapping[str, str | Mapping[str, str]]
"""An emitted program's `PARAMS`."""


@dataclass(frozen=True)
class Program:
    """context is the number of tokens a sequence may hold, None where nothing limits it.

    entries: functions of the same form as `extend` that decoding calls beside it, a drafter for instance;
    they may take further operands after the tokens and give further results before the cache.
    decode: the strategy and its settings, functions and parameters by name.
    """

    extend: Extend
    params: Table
    context: int | None = None
    entries: Mapping[str, Callable[..., Any]] = field(default_factory=dict[str, Callable[..., Any]])
    decode: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def forward(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits of every token, from the start of each sequence."""
        return self.extend(params, tokens)[0]


def run(
    file: str, extend: Extend, params: Table, context: int | None,
    entries: Mapping[str, Callable[..., Any]] | None = None, decode: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """The command line of an emitted program: continue a prompt with the weights beside `file`."""
    from effc.runtime.command import main

    main(file, Program(extend, params, context, entries or {}, decode or {}))
