"""Handlers: the same program with a fixed seed, an earlier trace, observed sites, hidden ones, or other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from effc.errors import EffcError, nearest
from effc.programs import keys
from effc.programs.effects import Param, Sample
from effc.programs.execution import Execution
from effc.programs.keys import Key
from effc.programs.program import Bound, Match, Site
from effc.programs.scheduler import run
from effc.programs.trace import Record, Trace


@dataclass(frozen=True)
class _Seed:
    key: Key

    def handle(self, site: Site) -> Site:
        return site if site.key else replace(site, key=keys.at(self.key, site.name))

    def finish(self, names: frozenset[str]) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class _Replay:
    past: Mapping[str, Record]

    def handle(self, site: Site) -> Site:
        return replace(site, past=self.past.get(site.name, site.past))

    def finish(self, names: frozenset[str]) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class _Condition:
    values: Mapping[str, Any]
    strict: bool

    def handle(self, site: Site) -> Site:
        if site.name not in self.values:
            return site
        if not isinstance(site.effect, Sample):
            raise EffcError(f"condition: '{site.name}' is a {type(site.effect).__name__.lower()}, want a sample")
        return replace(site, obs=self.values[site.name])

    def finish(self, names: frozenset[str]) -> None:
        _met("condition", self.values if self.strict else (), names)


@dataclass(frozen=True)
class _Block:
    hidden: Callable[[str], bool]

    def handle(self, site: Site) -> Site:
        return replace(site, hidden=site.hidden or self.hidden(site.name))

    def finish(self, names: frozenset[str]) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class _Param:
    values: Mapping[str, Any]

    def handle(self, site: Site) -> Site:
        given = isinstance(site.effect, Param) and site.name in self.values
        return replace(site, given=self.values[site.name]) if given else site

    def finish(self, names: frozenset[str]) -> None:
        _met("param", self.values, names)


@dataclass(frozen=True)
class _Simulate:
    match: Match

    def handle(self, site: Site) -> Site:
        return replace(site, match=self.match)

    def finish(self, names: frozenset[str]) -> None:
        """Nothing to check."""


def seed(bound: Bound, seed: int | jax.Array) -> Bound:
    """Its draws depend on this seed alone, wherever it runs."""
    return bound.under(_Seed(keys.root(seed)))


def replay(bound: Bound, trace: Trace | Mapping[str, Record]) -> Bound:
    """Sites that the trace has keep their values; their scores too, unless the distribution there is another now."""
    return bound.under(_Replay(trace.sites if isinstance(trace, Trace) else dict(trace)))


def condition(bound: Bound, values: Mapping[str, Any], *, strict: bool = True) -> Bound:
    """Samples at these sites become observations; strict: EffcError where a run never comes to one of them."""
    return bound.under(_Condition(dict(values), strict))


def block(bound: Bound, sites: Iterable[str] | Callable[[str], bool] | None = None) -> Bound:
    """These sites (None: all) run, but are in no trace, score or weight, and outer handlers do not see them."""
    if sites is None or callable(sites):
        return bound.under(_Block(sites or (lambda _: True)))
    names = frozenset([sites] if isinstance(sites, str) else sites)
    return bound.under(_Block(names.__contains__))


def param(bound: Bound, values: Mapping[str, Any]) -> Bound:
    """Parameters get these values instead of their own."""
    return bound.under(_Param(dict(values)))


def simulate(bound: Bound, match: Match) -> Bound:
    """Observed sites are drawn as well; where match(drawn, observed) is false the trace is rejected."""
    return bound.under(_Simulate(match))


def trace(bound: Bound, seed: int | jax.Array = 0) -> Trace:
    """Of one run."""
    execution = Execution(bound, keys.root(seed))
    run([execution])
    return execution.trace()


def _met(where: str, wanted: Iterable[str], names: frozenset[str]) -> None:
    for name in wanted:
        if name not in names:
            raise EffcError(f"{where}: no site '{name}' in this run{nearest(name, names)}")
