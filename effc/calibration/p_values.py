"""P-values for `the mean loss is above delta`, from n independent losses in [0,1] of mean `mean`.

Under that hypothesis each is at most u with probability at most u, whatever the losses' distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

PValue = Callable[[float, int, float], float]
"""(mean loss, number of losses, delta) -> p."""


def hoeffding(mean: float, n: int, delta: float) -> float:
    """exp(-2 n (delta - mean)^2) below delta, else 1."""
    return math.exp(-2 * n * max(0.0, delta - mean) ** 2)


def hoeffding_bentkus(mean: float, n: int, delta: float) -> float:
    """The lesser of the Chernoff-Hoeffding bound and e times a binomial tail; much the tighter for small delta."""
    if not 0 < delta < 1:
        return 1.0 if delta <= 0 else 0.0
    bentkus = math.e * binomial_cdf(math.ceil(n * mean - 1e-9), n, delta)
    return min(1.0, math.exp(-n * relative_entropy(min(mean, delta), delta)), bentkus)


def relative_entropy(a: float, b: float) -> float:
    """a ln(a/b) + (1-a) ln((1-a)/(1-b)) for a in [0,1], b in (0,1)."""
    return _part(a, b) + _part(1 - a, 1 - b)


def _part(a: float, b: float) -> float:
    return a * math.log(a / b) if a > 0 else 0.0


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Bin(n,p) <= k), p in (0,1)."""
    if k >= n:
        return 1.0
    whole = math.lgamma(n + 1)
    odds, none = math.log(p), math.log1p(-p)
    logs = (whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * odds + (n - i) * none for i in range(k + 1))
    return min(1.0, math.fsum(map(math.exp, logs)))


def needed(delta: float, epsilon: float, p_value: PValue = hoeffding_bentkus) -> int:
    """The fewest losses that can certify delta at epsilon: all of them zero."""
    high = 1
    while p_value(0.0, high, delta) > epsilon:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(0.0, middle, delta) <= epsilon else (middle, high)
    return high


def largest(n: int, delta: float, epsilon: float, p_value: PValue = hoeffding_bentkus) -> float | None:
    """The largest mean of n losses that certifies delta at epsilon; None where none does."""
    if p_value(0.0, n, delta) > epsilon:
        return None
    low, high = 0.0, delta
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, n, delta) <= epsilon else (low, middle)
    return low
