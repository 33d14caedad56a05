"""What a plan foretells: it follows from structure, and a report holds it against what was."""

from __future__ import annotations

from pathlib import Path

import pytest

from effc.ir.analysis import runs
from effc.ir.parser import parse
from effc.passes import runner
from effc.pipeline import Pipeline
from effc.plan import token_bytes
from effc.predict import PREPARING, Prediction, decoding, predict, step_seconds
from effc.report import Report, Side
from effc.weights import nbytes

TINY = (Path(__file__).parents[1] / "passes" / "tiny.effc").read_text()
SIX = parse(TINY.replace("2 * f32", "6 * f32").replace("times=2", "times=6"))


def after(passes: str):
    return runner.run(SIX, Pipeline.parse(passes).ordered())[-1].after


def test_fewer_bytes_are_faster_and_smaller() -> None:
    plain, coded = (predict(SIX, module, {}, 1000) for module in (SIX, after("quant8")))
    assert coded.nbytes == nbytes(after("quant8")) < plain.nbytes
    assert coded.token_bytes < plain.token_bytes
    assert coded.decode > plain.decode
    assert "GB/s and" in plain.lines()[0]


def test_training_takes_its_minutes_and_its_memory() -> None:
    one, two = (predict(SIX, SIX, minutes, 1000) for minutes in ({}, {"mor": 10.0, "calm": 5.0}))
    assert two.seconds - one.seconds == pytest.approx(900 + 2 * PREPARING)
    assert two.peak_bytes > one.peak_bytes
    assert "15 min of them training" in " ".join(two.lines())


def test_a_step_takes_what_its_arithmetic_does() -> None:
    assert step_seconds(SIX) == pytest.approx(3 * step_seconds(parse(TINY)), rel=0.5)
    assert 0 < step_seconds(SIX) < 10


def test_layers_that_share_are_read_each_time_and_routed_ones_as_often_as_they_run() -> None:
    folded, routed = after("mor"), after("mor{router=expert}")
    assert token_bytes(folded) == token_bytes(SIX)
    assert runs(routed)["layer"] == 5  # first, last, two of the first run, half of two of the second
    assert token_bytes(routed) < token_bytes(folded)
    assert decoding(routed).rate > decoding(folded).rate


def test_the_report_holds_it_against_what_was() -> None:
    told = Prediction(10**6, 2 * 10**6, 400.0, 5 * 10**8, 60.0, 0.0)
    report = Report("m", "", "exact", "", Side(1, 1, 1), Side(1, 10**6, 10**6), peak_bytes=6 * 10**8)
    line = told.beside(report, 75.0)
    assert "a token reads 2.0 MB (1.0 MB)" in line
    assert "time 60 s (75 s)" in line
    assert "400 tokens/s (not measured)" in line
