"""Programs: generator functions that yield effects, bound to their arguments and to handlers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from effc.errors import EffcError
from effc.programs.effects import MISSING, Effect, Sample
from effc.programs.keys import Key
from effc.programs.trace import Record

Match = Callable[[Any, Any], bool]


@dataclass(frozen=True)
class Site:
    """An effect on its way: what handlers see, under its name, and may change."""

    name: str
    effect: Effect
    key: Key | None = None
    """Given by a seed; else the trace's own decides."""
    obs: Any = MISSING
    given: Any = MISSING
    """A parameter's value."""
    past: Record | None = None
    """From an earlier trace."""
    match: Match | None = None
    """Observations are drawn too, and have to match."""
    hidden: bool = False

    @property
    def fresh(self) -> bool:
        """Whether a value is to be drawn there."""
        return isinstance(self.effect, Sample) and self.obs is MISSING and self.past is None


class Handler(Protocol):
    """Changes the sites of the program it is put on."""

    def handle(self, site: Site) -> Site:
        """The site, changed or not."""
        ...

    def finish(self, names: frozenset[str]) -> None:
        """At the end of a run that was not rejected, with the names of all its sites."""
        ...


@dataclass(frozen=True)
class Bound:
    """A program with its arguments: what inference runs, and what another program may yield."""

    body: Callable[..., Generator[Any, Any, Any]]
    args: tuple[Any, ...]
    options: dict[str, Any]
    name: str
    handlers: tuple[Handler, ...] = ()

    def named(self, name: str) -> Bound:
        """With another scope for its sites, where a program runs twice in another."""
        return replace(self, name=name)

    def under(self, handler: Handler) -> Bound:
        """With one more handler, outside those it has."""
        return replace(self, handlers=(*self.handlers, handler))

    def start(self) -> Generator[Any, Any, Any]:
        """A fresh run."""
        return self.body(*self.args, **self.options)


@dataclass(frozen=True)
class Program:
    """What `@program` makes of a generator function: calling it binds arguments and runs nothing."""

    body: Callable[..., Generator[Any, Any, Any]]

    def __call__(self, *args: Any, **options: Any) -> Bound:
        """Arguments are checked here, not when it runs."""
        name = self.body.__name__
        try:
            inspect.signature(self.body).bind(*args, **options)
        except TypeError as error:
            raise EffcError(f"program {name}: {error}, want {name}{inspect.signature(self.body)}") from None
        return Bound(self.body, args, options, name)


def program(body: Callable[..., Generator[Any, Any, Any]]) -> Program:
    """Decorates a generator function: `x = yield sample(dist, "x")` ... `return x`."""
    if not inspect.isgeneratorfunction(body):
        name = getattr(body, "__name__", repr(body))
        raise EffcError(f"program {name}: no yield in it, want a generator function")
    return Program(body)
