"""Healing of folds and what is measured of routers: the baseline beside, depth, tokens/s and keys in the report."""

from __future__ import annotations

import pytest

from effc.passes.mor.measure import cache_bytes, cache_share
from effc.runtime.recursion import Depth


@pytest.mark.slow
def test_the_baseline_trains_as_many_steps(served) -> None:
    found = served("mor{span=1-4,init=lower,baseline=steps}", heal=3)
    folded, alone = found.reports[0].trained
    assert (folded["title"], folded["steps"], alone["steps"]) == ("mor: folded", 3, 3)
    assert alone["title"].startswith("mor: layers 0, ")
    assert alone["title"].count(",") == 3  # four layers, as many as there are arrays
    assert all({"perplexity", "kl"} <= look["values"].keys() for run in (folded, alone) for look in run["looks"])


@pytest.mark.slow
@pytest.mark.parametrize("options", ["router=expert", "router=expert,kv=shared", "router=token"])
def test_what_routing_wins_is_measured(served, options: str) -> None:
    found = served(f"mor{{span=1-4,init=lower,{options}}}", heal=3)
    told = found.reports[0].measured
    assert 1 <= told["depth"] <= 2
    assert told["gain"] > 0
    formula = {"router=expert": (2 + 2 * 1.5) / 6, "router=expert,kv=shared": 4 / 6, "router=token": 1.0}[options]
    assert told["cache_by_formula"] == pytest.approx(formula)
    depths = [e for e in found.engine.empty(1, 64).entries if isinstance(e, Depth)]
    spare = sum(e.slack + 1 for e in depths if e.entries)
    counts = 4 * len(depths)  # bytes: how many tokens each depth keeps
    assert told["cache"] <= cache_share(found.module) + 2 * spare / (6 * 16) + counts / cache_bytes(found.engine, 16)
    assert len(found.reports[0].calibrated()) == 3
