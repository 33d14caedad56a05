"""Fixed-sequence testing: the guarantee over many calibration sets, and where it stops."""

import numpy as np
import pytest

from effc.calibration.learn_then_test import certify
from effc.errors import EffcError

GRID = (0.9, 0.8, 0.7, 0.6, 0.5)


def test_stops_at_the_first_failure_though_later_ones_would_pass():
    asked = []

    def losses(setting):
        asked.append(setting)
        return [0.0 if setting != 0.7 else 0.9] * 100

    found = certify(losses, 100, delta=0.1, epsilon=0.05, grid=GRID)
    assert found.chosen == 0.8 and asked == [0.9, 0.8, 0.7]
    assert [t.passed for t in found.tried] == [True, True, False]
    assert found.loss == 0


def test_too_few_prompts_give_the_full_model_and_the_number_needed():
    found = certify(lambda setting: pytest.fail("nothing can be certified"), 28, delta=0.1, epsilon=0.05)
    assert found.chosen is None and found.needed == 29 and found.loss == 0
    assert found.reason() == "28 calibration prompts, want 29 at least for delta 0.1"
    assert certify(lambda s: [], 0, delta=0.1, epsilon=0.05).chosen is None


def test_a_failure_at_once_gives_the_full_model_and_says_why():
    found = certify(lambda setting: [0.5] * 60, 60, delta=0.1, epsilon=0.05, grid=GRID)
    assert found.chosen is None and "threshold 0.9 the mean loss of 60 prompts is 0.500" in found.reason()


def test_the_true_risk_exceeds_delta_no_more_than_epsilon_of_the_time():
    """Risk rises as the threshold falls; a fifth of the prompts carry most of it, so means are noisy."""
    rng, delta, epsilon = np.random.default_rng(0), 0.1, 0.05
    true = dict(zip(GRID, (0.02, 0.06, 0.09, 0.11, 0.3)))
    wrong = 0
    for _ in range(200):
        hard = rng.random(150)

        def losses(setting, hard=hard):
            return (hard < true[setting]).astype(float).tolist()

        found = certify(losses, 150, delta=delta, epsilon=epsilon, grid=GRID)
        wrong += found.chosen is not None and true[found.chosen] > delta
    assert wrong / 200 <= epsilon


@pytest.mark.parametrize(("delta", "epsilon"), [(0.0, 0.05), (1.0, 0.05), (0.1, 0.0), (0.1, 1.5)])
def test_shares_outside_zero_and_one_are_refused(delta, epsilon):
    with pytest.raises(EffcError, match="want more than 0 and less than 1"):
        certify(lambda s: [0.0], 1, delta=delta, epsilon=epsilon)


def test_losses_outside_the_unit_interval_are_refused():
    with pytest.raises(EffcError, match=r"want 100 in \[0,1\]"):
        certify(lambda s: [1.2] * 100, 100, delta=0.1, epsilon=0.05)
