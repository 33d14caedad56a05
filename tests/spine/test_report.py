"""The report: rows, JSON and the page say the same, and the page needs no other file."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from effc.evaluate import Quality
from effc.plan import side, token_bytes
from effc.report import PassReport, Report, Side, Speed, size


@pytest.fixture
def report() -> Report:
    before = Side(1000, 4000, 4000, Quality(100, 2.0, 300), Speed(900.0, 50.0, 128, 64))
    after = Side(1000, 600, 500, Quality(100, 2.1, 300, 0.05, 0.9), Speed(800.0, 150.0, 128, 64))
    passes = [PassReport("quant4", "lossy", 0.5, ["a choice"], [("w<1>", "is small")], 0.02)]
    return Report("m", "quant4", "lossy", "changes logits", before, after, passes, "a text: 100 tokens",
                  ["a note"], {"lower": 1.5}, 10**9)  # fmt: skip


def test_table(report: Report, golden) -> None:
    console = Console(width=90, color_system=None)
    with console.capture() as out:
        console.print(report.table())
    golden("\n".join(line.rstrip() for line in out.get().splitlines()) + "\n")


def test_json_holds_every_number(report: Report) -> None:
    data = json.loads(json.dumps(report.json()))
    assert data["after"]["quality"] == {
        "tokens": 100, "perplexity": pytest.approx(8.16617), "bits_per_byte": pytest.approx(1.00989, rel=1e-4),
        "kl": 0.05, "top1": 0.9,
    }  # fmt: skip
    assert data["after"]["bytes_per_token"] == 500
    assert data["after"]["speed"]["decode"] == 150.0
    assert data["passes"][0]["skips"] == [{"what": "w<1>", "why": "is small"}]


def test_the_page_stands_alone(report: Report) -> None:
    page = report.html()
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    for row in report.rows():
        assert row.before in page
        assert row.after in page
    assert "w&lt;1&gt;" in page
    assert "a note" in page


def test_what_was_not_measured_is_a_dash() -> None:
    bare = Report("m", "", "exact", "same", Side(1, 4, 4), Side(1, 4, 4))
    assert [r.after for r in bare.rows()][3:] == ["-"] * 6
    assert "no passes" in bare.html()


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (88_272_000, "88.3 MB"), (2.5e12, "2500.0 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_bytes_a_token_count_layers_and_single_rows(tiny) -> None:
    assert token_bytes(tiny) == side(tiny).nbytes  # the table is the head too, so it is read whole
    untied = tiny.forward()
    ops = tuple(op for op in untied.ops if op.kind != "linear")
    bare = tiny.with_func(replace(untied, ops=ops, results=("n",)))
    assert token_bytes(bare) == side(tiny).nbytes - 160 * 64 * 4 + 64 * 4
