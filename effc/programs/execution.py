"""One run of a program: a host generator that stops where it needs a model, and after every record."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from effc.errors import EffcError
from effc.programs import keys
from effc.programs.calls import Answer, Call
from effc.programs.distributions import Distribution, Draw, Failed, Memo
from effc.programs.effects import MISSING, Effect, Factor, Log, Param, Reject, Sample
from effc.programs.keys import Key
from effc.programs.program import Bound, Match, Site
from effc.programs.trace import LATENT, OBSERVED, Record, Trace

Step = Generator[list[Call] | Site | Record, Any, Any]
"""Yields model calls, and is sent their answers; yields each site before it runs and its record after."""

Until = Callable[["Execution", Site | Record], bool]
"""Whether to pause there."""


@dataclass
class _Frame:
    """A program under way; scope: what its sites' full names begin with."""

    bound: Bound
    scope: str
    outer: _Frame | None
    names: set[str] = field(default_factory=set[str])
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def name(self, effect: Effect | Bound) -> str:
        """In this scope; effects without a name are numbered by kind."""
        if effect.name:
            return effect.name
        kind = type(effect).__name__.lower()
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return f"{kind}{self.counts[kind]}"


class Execution:
    """A trace in the making; past: records of another, taken over as they are before anything is drawn."""

    def __init__(self, bound: Bound, key: Key, past: Mapping[str, Record] | None = None):
        self.bound, self.key, self.past = bound, key, dict(past or {})
        self.tape: list[Record] = []
        self.rejected: str | None = None
        self.done, self.value = False, None
        self._memo: list[tuple[Distribution, Any]] = []
        self._steps = self._run(bound, None)

    def advance(self, answers: list[Answer] | None, until: Until) -> list[Call] | None:
        """Goes on to the next model calls; None when done, or where `until` says to pause."""
        while True:
            try:
                item = self._steps.send(answers)
            except StopIteration as stop:
                self.done, self.value = True, stop.value
                return None
            if isinstance(item, list):
                return item
            answers = None
            if until(self, item):
                return None

    @property
    def drawn(self) -> int:
        """Samples of its own, not taken over."""
        return sum(record.kind == LATENT and record.name not in self.past for record in self.tape)

    def trace(self) -> Trace:
        """What there is so far."""
        records = tuple(record for record in self.tape if not record.hidden)
        return Trace(records, self.value, self.rejected, self.done, self.key)

    # ---- programs

    def _run(self, bound: Bound, outer: _Frame | None, scope: str = "") -> Step:
        """The program's value, None once the trace is rejected."""
        frame, generator, sent = _Frame(bound, scope, outer), bound.start(), None
        while True:
            try:
                effect = generator.send(sent)
            except StopIteration as stop:
                value = stop.value
                break
            sent = yield from self._perform(effect, frame)
            if self.rejected is not None:
                generator.close()
                return None
        for handler in bound.handlers:
            handler.finish(frozenset(frame.names))
        return value

    def _perform(self, effect: Any, frame: _Frame) -> Step:
        if not isinstance(effect, Effect | Bound):
            where = f"program {frame.bound.name}"
            hint = "; a program of its own is yielded called, as `yield inner(x)`" if callable(effect) else ""
            raise EffcError(f"{where}: yielded {effect!r}, want an effect (sample, observe, factor, ...){hint}")
        name = frame.name(effect)
        self._take(frame, name)
        full = frame.scope + name
        if isinstance(effect, Bound):
            value = yield from self._run(effect, frame, f"{full}/")
            if self.rejected is None:
                hidden = self._handled(Log(value), full, frame).hidden
                yield self._made(Record(full, "return", value, hidden=hidden))
            return value
        site = self._handled(effect, full, frame)
        yield site
        record = yield from self._record(site)
        if record.score == -math.inf and self.rejected is None:
            self.rejected = f"{full}: {record.value!r} cannot be"
        yield self._made(replace(record, name=full, hidden=site.hidden))
        return record.value

    def _take(self, frame: _Frame, name: str) -> None:
        """Notes a name in its scope and, longer, in those around; each is there once."""
        if name in frame.names:
            raise EffcError(f"program {frame.bound.name}: two effects named '{name}', want names that differ")
        at: _Frame | None = frame
        while at is not None:
            at.names.add((frame.scope + name)[len(at.scope) :])
            at = at.outer

    def _handled(self, effect: Effect, full: str, frame: _Frame) -> Site:
        """The site after all handlers, inner ones first; outer ones do not see it once it is hidden."""
        obs = effect.obs if isinstance(effect, Sample) else MISSING
        site = Site(full, effect, obs=obs, past=self.past.get(full))
        at: _Frame | None = frame
        while at is not None:
            site = replace(site, name=full[len(at.scope) :])
            for handler in at.bound.handlers:
                site = site if site.hidden else handler.handle(site)
            at = at.outer
        return replace(site, name=full)

    def _made(self, record: Record) -> Record:
        self.tape.append(record)
        return record

    # ---- effects

    def _record(self, site: Site) -> Generator[list[Call], Any, Record]:
        match site.effect:
            case Sample(dist):
                return (yield from self._sampled(site, dist))
            case Factor(score):
                return Record(site.name, "factor", score, score)
            case Log(value):
                return Record(site.name, "log", value)
            case Param(_, init):
                return Record(site.name, "param", _parameter(site, init))
            case Reject(reason):
                return self._rejects(site.name, reason)

    def _rejects(self, name: str, reason: str) -> Record:
        self.rejected = reason or f"rejected at {name}"
        return Record(name, "reject", reason, -math.inf)

    def _sampled(self, site: Site, dist: Any) -> Generator[list[Call], Any, Record]:
        if not isinstance(dist, Distribution):
            raise EffcError(f"{site.name}: {dist!r}, want a distribution")
        try:
            return (yield from self._drawn(site, dist) if site.obs is MISSING else self._observed(site, dist))
        except Failed as error:
            return self._rejects(site.name, f"{site.name}: {error}")
        except EffcError as error:
            raise EffcError(f"{site.name}: {error}") from None

    def _observed(self, site: Site, dist: Distribution) -> Generator[list[Call], Any, Record]:
        past = site.past
        if site.match is not None:
            return (yield from self._simulated(site, dist, site.match))
        if past and past.kind == OBSERVED and past.value == site.obs and _same(past, dist):
            return past
        return _record(site, OBSERVED, dist, (yield from dist.scoring(site.obs)))

    def _simulated(self, site: Site, dist: Distribution, match: Match) -> Generator[list[Call], Any, Record]:
        draw = yield from dist.drawing(self._key(site))
        if not match(draw.value, site.obs):
            return self._rejects(site.name, f"{site.name}: drew {draw.value!r}, observed {site.obs!r}")
        return _record(site, LATENT, dist, draw)

    def _drawn(self, site: Site, dist: Distribution) -> Generator[list[Call], Any, Record]:
        past = site.past
        known = [value for one, value in self._memo if one == dist]
        if known:
            return Record(site.name, LATENT, known[0], dist=dist)
        if past is None:
            record = _record(site, LATENT, dist, (yield from dist.drawing(self._key(site))))
        elif _same(past, dist):
            record = replace(past, kind=LATENT)
        else:  # another distribution now: the value stays, its score is the new one's
            draw = yield from dist.scoring(past.value)
            record = _record(site, LATENT, dist, replace(draw, proposal=past.proposal))
        if isinstance(dist, Memo):
            self._memo.append((dist, record.value))
        return record

    def _key(self, site: Site) -> Key:
        return site.key or keys.at(self.key, site.name)


def _record(site: Site, kind: str, dist: Distribution, draw: Draw) -> Record:
    proposal = draw.proposal if kind == LATENT else 0.0
    return Record(site.name, kind, draw.value, draw.score, proposal, draw.tokens, draw.forwards, dist)


def _same(past: Record, dist: Distribution) -> bool:
    """Whether a record's score holds for this distribution."""
    return past.dist is None or past.dist == dist


def _parameter(site: Site, init: Any) -> Any:
    if site.given is not MISSING:
        return site.given
    if site.past and site.past.kind == "param":
        return site.past.value
    if init is MISSING:
        raise EffcError(f"param: '{site.name}' has no value, want one by handlers.param(program, values)")
    return init() if callable(init) else init
