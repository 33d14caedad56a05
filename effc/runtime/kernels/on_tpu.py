"""Whether programs carry TPU kernels, and what those say of themselves while they are traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax

from effc.runtime.kernels.alone import alone


@dataclass(frozen=True)
class Call:
    """One call of a kernel: bytes that a grid step reads from HBM, how many steps there are, bytes of VMEM.

    times: how often what only some steps do (the first, a sequence's last) is done; conditional: whether a step is
    itself under a condition, since some have nothing to do. The reader of schedules cannot see these.
    """

    name: str
    step_bytes: float
    steps: int
    vmem: int = 0
    times: int = 1
    conditional: bool = False


_calls: ContextVar[list[Call] | None] = ContextVar("effc_tpu_calls", default=None)


_generation: ContextVar[str] = ContextVar("effc_tpu_generation", default="")

DEFAULT = "v5e"
"""What tiles are chosen for where no TPU is there and none is named."""

KINDS = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e", "7x": "tpu7x"}
"""Device kinds, by how they go on after `TPU `, and generations."""


@contextlib.contextmanager
def traced(generation: str = DEFAULT) -> Iterator[list[Call]]:
    """Programs traced inside carry TPU kernels for a generation, whatever machine traces; gives the list of calls."""
    calls: list[Call] = []
    tokens = _calls.set(calls), _generation.set(generation)
    try:
        yield calls
    finally:
        _calls.reset(tokens[0])
        _generation.reset(tokens[1])


def generation() -> str:
    """v4, v5e, v5p, v6e or tpu7x: of the programs traced here, else of the TPU that is there."""
    if _generation.get() or jax.default_backend() != "tpu":
        return _generation.get() or DEFAULT
    kind = jax.devices()[0].device_kind.removeprefix("TPU").strip()
    return next((KINDS[known] for known in sorted(KINDS, key=len, reverse=True) if kind.startswith(known)), DEFAULT)


def either(tpu: Callable[..., Any], default: Callable[..., Any], *arrays: Any) -> Any:
    """The first on TPUs, the other elsewhere; which is known when the program is lowered, so exports carry both."""
    return jax.lax.platform_dependent(*arrays, tpu=alone("tpu", _shared(tpu, generation())), default=default)


@dataclass(frozen=True)
class _Traced:
    """A kernel with options, traced and lowered once for arrays of the same shapes; their calls are told each time."""

    function: Callable[..., Any]
    told: dict[Any, Sequence[Call]] = field(default_factory=dict)

    def __call__(self, *arrays: Any) -> Any:
        fresh: list[Call] = []
        token = _calls.set(fresh)
        try:
            out = self.function(*arrays)
        finally:
            _calls.reset(token)
        leaves, tree = jax.tree.flatten(arrays)
        key = tree, tuple((x.shape, x.dtype) for x in leaves)
        for call in self.told.setdefault(key, fresh):
            note(call)
        return out


def _shared(function: Callable[..., Any], chip: str) -> _Traced:
    """Of a function of a module, or a `partial` of one."""
    options = function.keywords if isinstance(function, partial) else {}
    return _traced(function.func if isinstance(function, partial) else function, tuple(sorted(options.items())), chip)


@cache
def _traced(function: Callable[..., Any], options: tuple[tuple[str, Any], ...], chip: str) -> _Traced:
    """A program of many layers has few kernels: to trace each call of them took most of the time of lowering."""
    return _Traced(jax.jit(partial(function, **dict(options))))


def wanted() -> bool:
    """Whether programs may run on a TPU."""
    return _calls.get() is not None or jax.default_backend() == "tpu"


def note(call: Call) -> None:
    """A kernel tells of a call of it."""
    calls = _calls.get()
    if calls is not None:
        calls.append(call)
