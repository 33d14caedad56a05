"""Whether programs carry TPU kernels, and what those say of themselves while they are traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax

from effc.runtime.kernels.alone import alone


@dataclass(frozen=True)
class Call:
    """One call of a kernel: bytes that a grid step reads from HBM, how many steps there are, bytes of VMEM."""

    name: str
    step_bytes: float
    steps: int
    vmem: int = 0


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
    return jax.lax.platform_dependent(*arrays, tpu=alone("tpu", tpu), default=default)


def wanted() -> bool:
    """Whether programs may run on a TPU."""
    return _calls.get() is not None or jax.default_backend() == "tpu"


def note(name: str, step_bytes: float, steps: int, vmem: int = 0) -> None:
    """A kernel tells of a call of it."""
    calls = _calls.get()
    if calls is not None:
        calls.append(Call(name, step_bytes, steps, vmem))
