"""Losses of token sequences."""

import pytest

from effc.calibration.consistency import LIKENESS, agreement, risk, rouge_l, textual, token_f1


@pytest.mark.parametrize("likeness", LIKENESS.values())
def test_bounds(likeness):
    assert likeness([1, 2, 3], [1, 2, 3]) == 1 == likeness([], [])
    assert likeness([1, 2], [3, 4]) == 0 == likeness([1], [])


def test_rouge_l_is_about_order_and_token_f1_is_not():
    assert rouge_l([1, 2, 3, 4], [1, 3, 2, 4]) == 0.75
    assert token_f1([1, 2, 3, 4], [4, 3, 2, 1]) == 1
    assert rouge_l([1, 2, 3, 4], [4, 3, 2, 1]) == 0.25
    assert token_f1([1, 1, 1, 2], [1, 2]) == pytest.approx(2 / 3)


def test_agreement_counts_positions():
    assert agreement([1, 2, 3, 4], [1, 9, 3]) == 0.5


def test_textual_needs_no_reference_and_risk_never_rewards():
    assert textual([1, 2, 3, 4], [1, 3, 2, 4]) == 0.25
    assert risk(early=[1, 2], full=[3, 4], reference=[1, 2]) == 0
    assert risk(early=[3, 4], full=[1, 2], reference=[1, 2]) == 1
    assert risk(early=[1, 9], full=[1, 2], reference=[1, 2]) == 0.5
