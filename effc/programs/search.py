"""Inference in rounds: sequential importance sampling and beam search.

A generator cannot be copied, so a clone is a fresh run that takes over the records of the other, bit for bit and
without model calls, and goes on with a key of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effc.errors import EffcError
from effc.programs import keys
from effc.programs.execution import Execution
from effc.programs.inference import Seed
from effc.programs.keys import Key
from effc.programs.program import Bound, Site
from effc.programs.samples import Samples, logsumexp
from effc.programs.scheduler import run
from effc.programs.trace import OBSERVED, Record

ROUNDS = 1000
"""At most so many: a program that never returns ends too."""


def clone(execution: Execution, key: Key) -> Execution:
    """The same up to here; what follows is drawn with another key."""
    return Execution(execution.bound, key, {record.name: record for record in execution.tape})


@dataclass
class _Particle:
    """base: its trace's weight when particles were last resampled, which no longer counts."""

    execution: Execution
    base: float = 0.0

    @property
    def weight(self) -> float:
        weight = self.execution.trace().weight
        return weight - self.base if weight > -math.inf else weight


def sequential(
    bound: Bound, n: int, seed: Seed = 0, *, resample: float = 0.5, max_rounds: int = ROUNDS
) -> Samples:  # fmt: skip
    """n particles, side by side from one observation or factor to the next.

    Where their effective number falls below resample * n they are drawn again by weight (systematic resampling);
    resample 0 never does: sequential importance sampling. Both estimate what likelihood weighting does.
    """
    if n < 1 or not 0 <= resample <= 1:
        raise EffcError(f"sequential: n={n}, resample={resample}, want n of 1 or more and resample of 0 to 1")
    root, evidence = keys.root(seed), 0.0
    particles = [_Particle(Execution(bound, keys.fold(root, i))) for i in range(n)]
    for turn in range(_rounds("sequential", max_rounds)):
        run([p.execution for p in particles], _weighs)
        logs = np.asarray([p.weight for p in particles])
        if all(p.execution.done for p in particles):
            return _finished(particles, logs, evidence)
        if _starved(logs, resample):
            evidence += logsumexp(logs) - math.log(n)
            particles = _resampled(particles, logs, keys.at(root, f"\0resample{turn}"))
    raise EffcError(f"sequential: not done after {max_rounds} rounds, want a program that returns, or more max_rounds")


def _weighs(execution: Execution, item: Site | Record) -> bool:
    """Pauses after each new observation and factor."""
    return isinstance(item, Record) and item.kind in (OBSERVED, "factor") and item.name not in execution.past


def _starved(logs: np.ndarray, resample: float) -> bool:
    """Whether too few particles carry the weight; if all have none, Samples says so at the end."""
    total = logsumexp(logs)
    return total > -math.inf and resample > 0 and 1 / float(np.sum(np.exp(logs - total) ** 2)) < resample * len(logs)


def _resampled(particles: Sequence[_Particle], logs: np.ndarray, key: Key) -> list[_Particle]:
    """As many, each by its weight; the first of a particle's copies is itself."""
    n, weights = len(particles), np.exp(logs - logsumexp(logs))
    points = (np.arange(n) + keys.rng(key).random()) / n
    parents = np.minimum(np.searchsorted(np.cumsum(weights), points, side="right"), n - 1)
    out, kept = list[_Particle](), set[int]()
    for slot, parent in enumerate(map(int, parents)):
        old = particles[parent]
        execution = old.execution if parent not in kept else clone(old.execution, keys.fold(key, slot))
        kept.add(parent)
        out.append(_Particle(execution, old.base + old.weight))
    return out


def _finished(particles: Sequence[_Particle], logs: np.ndarray, evidence: float) -> Samples:
    n = len(particles)
    traces = tuple(p.execution.trace() for p in particles)
    return Samples(traces, tuple(map(float, logs)), n, evidence + logsumexp(logs) - math.log(n))


def beam(
    bound: Bound, width: int = 5, expand: int = 3, seed: Seed = 0, *, max_rounds: int = ROUNDS
) -> Samples:  # fmt: skip
    """The best `width` traces by score, best first; each round every one of them draws its next sample `expand` times.

    Copies that drew the same are one. What was observed on the way counts, so verifiers steer the search.
    """
    if width < 1 or expand < 1:
        raise EffcError(f"beam: width={width}, expand={expand}, want at least 1 of each")
    root = keys.root(seed)
    beams, attempts = [Execution(bound, root)], 0
    for turn in range(_rounds("beam", max_rounds)):
        fresh = [clone(b, keys.fold(root, turn, i, j)) for i, b in _open(beams) for j in range(expand)]
        if not fresh:
            return _ranked(beams, attempts)
        run(fresh, _draws_again)
        attempts += len(fresh)
        beams = _best([*(b for b in beams if b.done), *fresh], width)
    raise EffcError(f"beam: not done after {max_rounds} rounds, want a program that returns, or more max_rounds")


def _draws_again(execution: Execution, item: Site | Record) -> bool:
    """Pauses before the second draw of its own: what is observed after the first counts."""
    return isinstance(item, Site) and item.fresh and execution.drawn > 0


def _open(beams: Sequence[Execution]) -> list[tuple[int, Execution]]:
    return [(i, execution) for i, execution in enumerate(beams) if not execution.done]


def _best(found: Sequence[Execution], width: int) -> list[Execution]:
    """By score; of those with the same records the first; rejected ones only where there is no other."""
    different = {repr([(r.name, r.value) for r in e.tape]): e for e in reversed(found)}
    ranked = sorted(different.values(), key=lambda e: (-e.trace().score, found.index(e)))
    alive = [e for e in ranked if e.rejected is None]
    return (alive or ranked)[:width]


def _ranked(beams: Sequence[Execution], attempts: int) -> Samples:
    traces = tuple(execution.trace() for execution in beams)
    return Samples(traces, tuple(trace.score for trace in traces), attempts)


def _rounds(where: str, rounds: int) -> int:
    if rounds < 1:
        raise EffcError(f"{where}: max_rounds is {rounds}, want at least 1")
    return rounds
