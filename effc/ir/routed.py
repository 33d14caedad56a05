"""What `recurse` means: every layer runs on every token, tokens that are off stay as they are and hide their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effc.ir.core import Op
from effc.ir.ops import attribute
from effc.runtime import layers
from effc.runtime.recursion import moved
from effc.runtime.routing import Routing, admitted

Keys = dict[str, tuple[Array, ...]]
"""Keys and values of an attention op, by the value that it defines."""

Layer = Callable[[list["Tokens"], int, list[Array] | None], list[Array]]
"""(chunks, number of the layer, which tokens of each are on, None for all) -> states of each after the layer."""


@dataclass
class Routed:
    """How attention goes in one layer of one chunk: on bool[b,t] are the tokens whose keys are seen."""

    on: Array | None = None
    borrowed: Keys | None = None
    kept: Keys = field(default_factory=Keys)

    def attend(
        self, op: Op, q: Array, k: Array, v: Array, positions: Array, bias: Any, attrs: Mapping[str, Any]
    ) -> Array:
        """As the op says, over the keys that are seen."""
        name = op.out.name
        self.kept[name] = (k, v)
        if self.borrowed is not None:
            k, v = self.borrowed[name]
        if self.on is None:
            return layers.attention(q, k, v, positions, bias, **attrs)

        def row(q: Array, k: Array, v: Array, at: Array, on: Array) -> Array:
            def hidden(i: Array, j: Array, h: Array) -> Array:
                seen = jnp.where(on[j] | (i == j), 0.0, -jnp.inf)  # who is off sees itself: finite, and thrown away
                return seen if bias is None else seen + bias(i, j, h)

            return layers.attention(q[None], k[None], v[None], at[None], hidden, **attrs)[0]

        return jax.vmap(row)(q, k, v, positions, self.on)


class Tokens:
    """One chunk on its way: its operands, of which the first is the state."""

    def __init__(self, operands: Sequence[Array], positions: Array):
        self.operands, self.positions = list(operands), positions
        self.start, self.on = operands[0], jnp.ones(positions.shape, bool)
        self.first: dict[int, Keys] = {}
        """What depth 0 kept, by layer of the span."""

    @property
    def x(self) -> Array:
        return self.operands[0]


def recurse(op: Op, router: Array, chunks: list[Tokens], layer: Layer) -> None:
    """Run all depths; each chunk ends with its states as first operand."""
    times, span, start, slack = (_whole(op, name) for name in ("times", "span", "start", "slack"))
    gate, shared = str(attribute(op, "gate")), attribute(op, "kv") == "shared"
    capacity, alpha = op.attrs["capacity"], attribute(op, "alpha")
    assert isinstance(capacity, tuple) and isinstance(alpha, (int, float))
    shares = tuple(float(str(share)) for share in capacity)
    routing = Routing(router, str(attribute(op, "select")), shares, float(alpha))
    for depth in range(times):
        before = [tokens.x for tokens in chunks]
        gates = [_choose(routing, depth, tokens, slack, shared) if depth else None for tokens in chunks]
        for i in range(span):
            seen = [tokens.on for tokens in chunks] if depth and not shared else None
            for tokens, x in zip(chunks, layer(chunks, start + depth * span + i, seen), strict=True):
                tokens.operands[0] = x
        for tokens, old, g in zip(chunks, before, gates, strict=True):
            new = moved(old, tokens.x, g, gate) if depth else tokens.x
            tokens.operands[0] = jnp.where(tokens.on[..., None], new, old).astype(old.dtype)


def _choose(routing: Routing, depth: int, tokens: Tokens, slack: int, shared: bool) -> Array | None:
    choice = routing.choose(depth, tokens.start, tokens.x, tokens.on)
    share, none = routing.capacity[depth], jnp.zeros(tokens.x.shape[0], jnp.int32)
    limited = share < 1 and not shared
    tokens.on = admitted(choice.on, none, tokens.positions, share, slack) if limited else choice.on
    return choice.gate


def _whole(op: Op, name: str) -> int:
    value = attribute(op, name)
    assert isinstance(value, int)
    return value
