"""Two runs never share the folder that one keeps its work in."""

from __future__ import annotations

from pathlib import Path

import pytest

from effc import driver
from effc.driver import Settings
from effc.errors import EffcError
from effc.exclusive import exclusive
from effc.pipeline import Pipeline


def test_a_folder_is_one_runs_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with exclusive(folder), pytest.raises(EffcError, match="another run is at work there"), exclusive(folder):
        pass
    with pytest.raises(KeyError), exclusive(folder):
        raise KeyError
    with exclusive(folder):
        pass


@pytest.mark.parametrize(("passes", "held"), [("draft{kind=head}", True), ("quant8", False)])
def test_a_run_that_trains_holds_its_folder(tmp_path: Path, passes: str, held: bool) -> None:
    settings = Settings(passes=passes, work=tmp_path / "work")
    with driver._work(tmp_path / "out", settings, Pipeline.parse(passes)) as folder:
        assert folder == tmp_path / "work" and folder.exists() == held
        if held:
            with pytest.raises(EffcError, match=str(folder)), exclusive(folder):
                pass
    assert (tmp_path / "work").exists() == held  # what was asked for stays
    with driver._work(tmp_path / "out", Settings(passes=passes), Pipeline.parse(passes)) as folder:
        pass
    assert not folder.exists()
