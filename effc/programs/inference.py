"""Inference by running a program many times: forward, likelihood weighting, rejection (algorithms 6.1, 6.3-4).

Trace i of a run has the key fold_in(root, i), so that more samples begin with those of fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from effc.errors import EffcError
from effc.programs import keys
from effc.programs.execution import Execution
from effc.programs.handlers import simulate
from effc.programs.program import Bound, Match
from effc.programs.samples import Samples, equal, weighted
from effc.programs.scheduler import run
from effc.programs.trace import Trace

Seed = int | jax.Array


def run_all(bounds: Sequence[Bound], seed: Seed = 0, *, together: bool = True) -> list[Trace]:
    """A trace of each program, all run at once; `together` False runs one after another, to the same traces."""
    root = keys.root(seed)
    executions = [Execution(bound, keys.fold(root, i)) for i, bound in enumerate(bounds)]
    run(executions, together=together)
    return [execution.trace() for execution in executions]


def forward(bound: Bound, n: int, seed: Seed = 0, *, together: bool = True) -> Samples:
    """n traces as the program runs, observations not weighed; rejected ones have weight 0."""
    _count("forward", n)
    traces = run_all([bound] * n, seed, together=together)
    logs = tuple(0.0 if trace.rejected is None else -math.inf for trace in traces)
    return Samples(tuple(traces), logs, n)


def likelihood_weighting(bound: Bound, n: int, seed: Seed = 0, *, together: bool = True) -> Samples:
    """n traces, each weighed by what it observed, and by target over proposal where a sample was tempered.

    Filters (top_k, top_p, min_p, temperature 0) bound what can be drawn: the posterior is then over that support.
    """
    _count("likelihood_weighting", n)
    return weighted(run_all([bound] * n, seed, together=together))


def rejection(
    bound: Bound, n: int, seed: Seed = 0, *, match: Match | None = None, max_attempts: int | None = None,
    log_bound: float = 0.0,
) -> Samples:  # fmt: skip
    """Up to n traces from the posterior itself; at most max_attempts runs (20 a sample), EffcError if none is accepted.

    A run is accepted with probability exp(weight - log_bound): weights may be at most exp(log_bound), which log bound 0
    is right for where samples are not tempered and factors not positive. match(drawn, observed): observations are
    drawn instead, and a run is accepted where all of them match (`operator.eq`, or something looser).
    """
    _count("rejection", n)
    limit, root = max_attempts or 20 * n, keys.root(seed)
    program = simulate(bound, match) if match else bound
    accepted: list[Trace] = []
    for start in range(0, limit, n):
        batch = range(start, min(start + n, limit))
        executions = [Execution(program, keys.fold(root, i)) for i in batch]
        run(executions)
        traces = [execution.trace() for execution in executions]
        accepted += [t for t in traces if _accepts(t, match is not None, log_bound)]
        if len(accepted) >= n:
            return equal(accepted[:n], start + len(batch))
    if not accepted:
        raise EffcError(f"rejection: none of {limit} runs accepted, want more max_attempts, or likelihood_weighting")
    return equal(accepted, limit)


def _accepts(trace: Trace, simulated: bool, log_bound: float) -> bool:
    if trace.rejected is not None:
        return False
    excess = trace.weight - log_bound
    if excess > 1e-9:
        raise EffcError(
            f"rejection: a log weight of {trace.weight:.4g}, want at most log_bound={log_bound:g}; raise it"
        )
    if simulated and excess > -1e-9:
        return True
    return bool(keys.rng(keys.at(trace.key, "\0accept")).random() < math.exp(min(excess, 0.0)))


def _count(where: str, n: Any) -> None:
    if n < 1:
        raise EffcError(f"{where}: n is {n}, want at least 1")
