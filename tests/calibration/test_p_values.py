"""P-values: super-uniform under the hypothesis, and the numbers that plan a calibration."""

import math

import numpy as np
import pytest

from effc.calibration.p_values import binomial_cdf, hoeffding, hoeffding_bentkus, largest, needed

BOTH = [hoeffding, hoeffding_bentkus]


def _bernoulli(rng: np.random.Generator, n: int, mean: float) -> np.ndarray:
    return (rng.random(n) < mean).astype(float)


def _beta(rng: np.random.Generator, n: int, mean: float) -> np.ndarray:
    return rng.beta(0.5 * mean, 0.5 * (1 - mean), n)


@pytest.mark.parametrize("p_value", BOTH)
@pytest.mark.parametrize("draw", [_bernoulli, _beta])
@pytest.mark.parametrize(("n", "delta"), [(30, 0.1), (200, 0.1), (100, 0.3)])
def test_no_more_than_u_of_them_are_at_most_u_where_the_mean_is_delta(p_value, draw, n, delta):
    rng = np.random.default_rng(0)
    values = np.array([p_value(float(draw(rng, n, delta).mean()), n, delta) for _ in range(600)])
    for u in (0.01, 0.05, 0.2, 0.5):
        assert (values <= u).mean() <= u + 3 * math.sqrt(u * (1 - u) / 600)


@pytest.mark.parametrize(("delta", "n"), [(0.02, 149), (0.05, 59), (0.1, 29), (0.25, 11)])
def test_prompts_needed(delta, n):
    assert needed(delta, 0.05) == n
    assert hoeffding_bentkus(0, n - 1, delta) > 0.05


@pytest.mark.parametrize(("delta", "n"), [(0.02, 3745), (0.05, 600), (0.1, 150), (0.25, 24)])
def test_prompts_needed_by_hoeffding_alone(delta, n):
    assert needed(delta, 0.05, hoeffding) == n


@pytest.mark.parametrize(
    ("delta", "n", "mean"), [(0.1, 200, 0.055), (0.1, 500, 0.070), (0.05, 500, 0.028), (0.02, 1000, 0.010)]
)
def test_largest_mean_that_is_certified(delta, n, mean):
    found = largest(n, delta, 0.05)
    assert found is not None and abs(found - mean) < 1.1e-3
    assert largest(10, delta, 0.05) is None


def test_binomial_tail_is_the_sum_written_out():
    for k in range(8):
        wanted = sum(math.comb(7, i) * 0.3**i * 0.7 ** (7 - i) for i in range(k + 1))
        assert math.isclose(binomial_cdf(k, 7, 0.3), wanted)


def test_more_loss_is_no_more_certain():
    values = [hoeffding_bentkus(i / 100, 100, 0.3) for i in range(101)]
    assert values == sorted(values) and values[30] >= 0.5 and values[-1] == 1
