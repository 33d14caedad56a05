"""What a run would do, from structure alone: passes in order, what they choose, sizes before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Group
from rich.table import Table
from rich.text import Text

from effc.ir.analysis import runs
from effc.ir.core import Module, Op, all_ops
from effc.passes.runner import Step
from effc.report import Report, Row, Side
from effc.weights import elements, nbytes, parts


def side(module: Module) -> Side:
    """Sizes of a module; nothing is measured."""
    return Side(elements(module), nbytes(module), token_bytes(module))


def token_bytes(module: Module) -> int:
    """Bytes of weights read to decode one token of one sequence: tables count for a row."""
    times = runs(module)
    reads: dict[tuple[str, str], int] = {}
    for func, op in all_ops(module):
        for role, name in op.params.items():
            here = func.name, name
            reads[here] = max(reads.get(here, 0), _read(module, op, role, name) * times.get(func.name, 0))
    return sum(reads.values())


def _read(module: Module, op: Op, role: str, name: str) -> int:
    """Bytes of one layer that one op reads for a token."""
    type_ = module.params[name].type
    whole = sum(part.nbytes for part in parts(type_).values())
    rows = type_.shape[0] if role == "table" else 1
    return whole // rows if isinstance(rows, int) and rows else whole


class Predicted(Protocol):
    """Speed, memory and time."""

    def lines(self) -> list[str]: ...
    def json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Plan:
    """For `--dry-run`."""

    name: str
    pipeline: str
    exactness: str
    before: Side
    after: Side
    steps: Sequence[Step]
    notes: Sequence[str] = ()
    phases: Sequence[str] = ()
    predicted: Predicted | None = None

    def table(self) -> Group:
        """For the terminal."""
        table = Table(title=f"{self.name}: {self.pipeline or 'no passes'} (dry run)", title_justify="left")
        for heading in ("", "before", "after", "change"):
            table.add_column(heading, justify="left" if not heading else "right")
        for row in self._rows():
            table.add_row(row.label, row.before, row.after, row.change)
        return Group(table, *(Text(line) for line in self._lines()))

    def _rows(self) -> list[Row]:
        report = Report(self.name, self.pipeline, self.exactness, "", self.before, self.after)
        return [row for row in report.rows() if row.before != "-" or row.after != "-"]

    def _lines(self) -> list[str]:
        lines = [*self.notes, *self.phases, *(self.predicted.lines() if self.predicted else [])]
        for number, step in enumerate(self.steps, 1):
            lines.append(f"{number}. {step.made_by} ({step.made_by.phase}, {step.made_by.exactness})")
            lines += [f"   {choice}" for choice in step.notes.choices]
            lines += [f"   {what} left alone: {why}" for what, why in step.notes.skips]
        return lines

    def json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "name": self.name,
            "pipeline": self.pipeline,
            "exactness": self.exactness,
            "before": self.before.json(),
            "after": self.after.json(),
            "passes": [_step_json(step) for step in self.steps],
            "notes": list(self.notes),
            "phases": list(self.phases),
            "predicted": self.predicted.json() if self.predicted else None,
        }


def _step_json(step: Step) -> dict[str, Any]:
    skips = [{"what": what, "why": why} for what, why in step.notes.skips]
    own = {
        "pass": str(step.made_by),
        "phase": str(step.made_by.phase),
        "exactness": str(step.made_by.exactness),
    }
    return own | {"choices": step.notes.choices, "skips": skips}
