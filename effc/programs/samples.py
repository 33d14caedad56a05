"""Weighted traces: what inference gives, and what is asked of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from effc.errors import EffcError
from effc.programs.trace import Trace

Of = str | Callable[[Trace], Any] | None
"""What of a trace: a site's value, a function of the trace, or (None) what the program returned."""


@dataclass(frozen=True)
class Samples:
    """Traces with log weights, not normalised. attempts: runs it took; log_evidence: log of the mean weight."""

    traces: tuple[Trace, ...]
    log_weights: tuple[float, ...]
    attempts: int = 0
    log_evidence: float = field(default=math.nan)

    def __len__(self) -> int:
        return len(self.traces)

    def __iter__(self) -> Iterator[Trace]:
        return iter(self.traces)

    def __getitem__(self, i: int) -> Trace:
        return self.traces[i]

    @cached_property
    def weights(self) -> np.ndarray:
        """f64[n], by logsumexp: they sum to 1. EffcError where every trace was rejected."""
        logs = np.asarray(self.log_weights, float)
        if not np.any(logs > -np.inf):
            reasons = sorted({trace.rejected for trace in self.traces if trace.rejected})
            why = f" ({reasons[0]})" if reasons else ""
            raise EffcError(f"samples: each of {len(self)} traces has weight 0{why}, want one that is possible")
        return np.exp(logs - logsumexp(logs))

    @property
    def ess(self) -> float:
        """Effective sample size: 1 over the sum of squared weights."""
        return float(1 / np.sum(self.weights**2))

    def posterior(self, of: Of = None) -> dict[Any, float]:
        """Probability of each value, likeliest first; rejected traces have none."""
        out: dict[Any, float] = {}
        for trace, weight in zip(self.traces, self.weights):
            if weight:
                value = _value(trace, of)
                out[value] = out.get(value, 0.0) + float(weight)
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    def mode(self, of: Of = None) -> tuple[Any, float]:
        """The likeliest value and its probability: over chains of thought, self-consistency."""
        return next(iter(self.posterior(of).items()))

    def mean(self, of: Of = None) -> float:
        """Weighted mean of a number."""
        return float(sum(p * float(value) for value, p in self.posterior(of).items()))

    def best(self) -> Trace:
        """The trace of the highest weight; the first where several have it."""
        return self.traces[int(np.argmax(self.log_weights))]

    def cost(self) -> dict[str, int]:
        """Tokens and forwards of all traces, each as if it had run alone."""
        return {
            "tokens": sum(trace.tokens for trace in self.traces),
            "forwards": sum(trace.forwards for trace in self.traces),
        }

    def table(self, *of: Of) -> list[Mapping[str, Any]]:
        """A row a trace: weight, score, and the sites named."""
        rows = zip(self.traces, self.weights)
        return [{"weight": float(w), "score": t.score} | {str(o): _value(t, o) for o in of} for t, w in rows]


def weighted(traces: Sequence[Trace], attempts: int = 0) -> Samples:
    """By importance weight (algorithms 6.3-4)."""
    logs = [trace.weight for trace in traces]
    evidence = logsumexp(np.asarray(logs)) - math.log(len(logs)) if logs else -math.inf
    return Samples(tuple(traces), tuple(logs), attempts or len(logs), evidence)


def equal(traces: Sequence[Trace], attempts: int = 0, log_evidence: float = math.nan) -> Samples:
    """Each as much as the others."""
    return Samples(tuple(traces), (0.0,) * len(traces), attempts or len(traces), log_evidence)


def logsumexp(logs: np.ndarray) -> float:
    """-inf where all of them are."""
    top = float(np.max(logs, initial=-np.inf))
    return top if math.isinf(top) else top + math.log(float(np.sum(np.exp(logs - top))))


def _value(trace: Trace, of: Of) -> Any:
    if of is None:
        return trace.value
    if callable(of):
        return of(trace)
    record = trace.sites.get(of)
    return record.value if record else None
