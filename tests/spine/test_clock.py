"""Steps of a run: timed, and held to the memory they may take."""

from __future__ import annotations

import pytest

from effc.clock import Clock
from effc.errors import EffcError


def test_steps_that_take_too_much_memory_end() -> None:
    clock = Clock(limit=1)
    with pytest.raises(EffcError, match=r"lower: .* of memory were held, want 0.00 GB at most"), clock.step("lower"):
        pass
    with pytest.raises(EffcError, match="write"), Clock(limit=1).step("write") as advance:
        advance(1)


def test_no_limit_and_a_wide_one_do_not_matter() -> None:
    for limit in (0, 10**12):
        clock = Clock(limit=limit)
        with clock.step("lower", 2) as advance:
            advance(2)
        assert clock.seconds["lower"] >= 0
