"""What a run did, in numbers: before and after, as a table for the terminal, JSON, and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

import jinja2
from rich.console import Group
from rich.table import Table
from rich.text import Text

from effc import curves
from effc.evaluate import Quality


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one sequence: of the prompt, and of what is generated; means of some runs."""

    prefill: float
    decode: float
    prompt: int
    generated: int
    spread: float = 0.0

    def json(self) -> dict[str, Any]:
        """Every number by name."""
        return asdict(self)


@dataclass(frozen=True)
class Side:
    """The model before, or after."""

    parameters: int
    nbytes: int
    token_bytes: int
    quality: Quality | None = None
    speed: Speed | None = None

    def json(self) -> dict[str, Any]:
        """Every number by name."""
        own = {"parameters": self.parameters, "bytes": self.nbytes, "bytes_per_token": self.token_bytes}
        own["bytes_per_parameter"] = self.nbytes / max(self.parameters, 1)  # type: ignore[assignment]
        quality = self.quality.json() if self.quality else None
        return own | {"quality": quality, "speed": self.speed.json() if self.speed else None}


@dataclass(frozen=True)
class PassReport:
    """A pass that ran: what it chose, what it left alone and why, how far it moved the logits."""

    spelling: str
    exactness: str
    seconds: float
    choices: Sequence[str] = ()
    skips: Sequence[tuple[str, str]] = ()
    gap: float | None = None
    trained: Sequence[Mapping[str, Any]] = ()
    """Runs of training: steps, seconds, tokens/s, looks at quality on the way, losses."""
    measured: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What a calibration measured."""

    def healing(self) -> list[str]:
        """A line for each run of training."""
        return [f"{run['title'] or self.spelling} trained {_run(run)}" for run in self.trained]

    def calibrated(self) -> list[str]:
        """What a calibration found, a line each."""
        told = [f"{self.spelling}: {line}" for line in self.measured.get("summary", ())]
        return [*told, *(f"  {line}" for line in self.measured.get("chart", ()))]

    def json(self) -> dict[str, Any]:
        """Every field by name."""
        skips = [{"what": what, "why": why} for what, why in self.skips]
        return asdict(self) | {"choices": list(self.choices), "skips": skips, "trained": list(self.trained)}


@dataclass(frozen=True)
class Report:
    """A whole run of `optimize`."""

    name: str
    pipeline: str
    exactness: str
    meaning: str
    before: Side
    after: Side
    passes: Sequence[PassReport] = ()
    text: str = ""
    notes: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    peak_bytes: int = 0
    planned: Mapping[str, Any] | None = None
    """What `effc plan` says of such a run."""

    def json(self) -> dict[str, Any]:
        """For report.json and --json."""
        return {
            "name": self.name,
            "pipeline": self.pipeline,
            "exactness": self.exactness,
            "before": self.before.json(),
            "after": self.after.json(),
            "passes": [p.json() for p in self.passes],
            "evaluated_on": self.text,
            "notes": list(self.notes),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_bytes": self.peak_bytes,
            "planned": dict(self.planned) if self.planned else None,
        }

    def rows(self) -> list[Row]:
        """The before/after table."""
        return [Row(label, *_cells(self, get, show), better) for label, get, show, better in _ROWS]

    def table(self) -> Group:
        """For the terminal."""
        table = Table(title=f"{self.name}: {self.pipeline or 'no passes'}", title_justify="left")
        for heading in ("", "before", "after", "change"):
            table.add_column(heading, justify="left" if not heading else "right")
        for row in self.rows():
            table.add_row(row.label, row.before, row.after, row.change)
        return Group(table, *(Text(line, style="dim") for line in self.footnotes()))

    def footnotes(self) -> list[str]:
        """What a reader must know to read the table."""
        lines = [f"{self.exactness}: {self.meaning}"]
        lines += [f"quality on {self.text}"] if self.text else []
        told = [line for made_by in self.passes for line in (*made_by.healing(), *made_by.calibrated())]
        return [*lines, *told, *self.notes]

    def html(self) -> str:
        """One page that needs no other file."""
        env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        env.filters["size"] = size
        env.filters["drawn"] = curves.svg
        return env.from_string(resources.files("effc").joinpath("report.html").read_text()).render(report=self)


def _run(run: Mapping[str, Any]) -> str:
    """`500 steps in 80 s, 5100 tokens/s: perplexity 30.1 -> 21.7, kl 0.62 -> 0.13`."""
    work = f"{run['steps']} steps in {run['seconds']:.0f} s, {run['tokens_per_second']:.0f} tokens/s"
    looks: Sequence[Mapping[str, Mapping[str, float]]] = run["looks"]
    names = looks[0]["values"] if looks else ()
    told = [f"{name} " + " -> ".join(format(look["values"][name], ".4g") for look in looks) for name in names]
    return f"{work}: {', '.join(told)}" if told else work


@dataclass(frozen=True)
class Row:
    """A line of the before/after table as text."""

    label: str
    before: str
    after: str
    change: str
    better: str  # "less", "more" or "": what an improvement is


def size(count: float) -> str:
    """`92.1 MB`: decimal, as disks and papers count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


Get = Callable[[Side], float | None]
Show = Callable[[float], str]


def _cells(report: Report, get: Get, show: Show) -> tuple[str, str, str]:
    before, after = get(report.before), get(report.after)
    change = f"x{after / before:.3g}" if before and after is not None else ""
    return _shown(before, show), _shown(after, show), change


def _shown(value: float | None, show: Show) -> str:
    return "-" if value is None else show(value)


def _quality(get: Callable[[Quality], float | None]) -> Get:
    return lambda side: get(side.quality) if side.quality else None


def _speed(get: Callable[[Speed], float]) -> Get:
    return lambda side: get(side.speed) if side.speed else None


_ROWS: list[tuple[str, Get, Show, str]] = [
    ("weights", lambda s: s.nbytes, size, "less"),
    ("bytes a parameter", lambda s: s.nbytes / max(s.parameters, 1), lambda x: f"{x:.3f}", "less"),
    ("bytes read a token", lambda s: s.token_bytes, size, "less"),
    ("decode tokens/s", _speed(lambda s: s.decode), lambda x: f"{x:.1f}", "more"),
    ("prefill tokens/s", _speed(lambda s: s.prefill), lambda x: f"{x:.0f}", "more"),
    ("perplexity", _quality(lambda q: q.perplexity), lambda x: f"{x:.3f}", "less"),
    ("bits a byte", _quality(lambda q: q.bits_per_byte), lambda x: f"{x:.4f}", "less"),
    ("KL to the input, nats a token", _quality(lambda q: q.kl), lambda x: f"{x:.5f}", "less"),
    ("same likeliest token", _quality(lambda q: q.top1), lambda x: f"{100 * x:.2f} %", "more"),
]
