"""What `effc passes` shows: every pass with its options and its promise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from effc.errors import EffcError, nearest
from effc.passes import PASSES, Option, Pass
from effc.passes.base import spell


@dataclass(frozen=True)
class Listing:
    """Passes in the order of their phases."""

    passes: tuple[type[Pass], ...]

    def json(self) -> dict[str, Any]:
        return {"passes": [_data(cls) for cls in self.passes]}

    def table(self) -> Any:
        """A rich renderable."""
        from rich.console import Group

        return Group(*[part for cls in self.passes for part in _entry(cls)])


def listing(name: str | None = None) -> Listing:
    """All passes, or the one of this name."""
    if name is None:
        return Listing(tuple(PASSES.values()))
    if name not in PASSES:
        raise EffcError(f"passes: no pass '{name}', want one of {', '.join(PASSES)}{nearest(name, PASSES)}")
    return Listing((PASSES[name],))


def _data(cls: type[Pass]) -> dict[str, Any]:
    options = [{"name": o.name, "type": o.kind, "default": o.default, "doc": o.doc} for o in cls.options()]
    promise = {"exactness": str(cls.exactness), "meaning": cls.exactness.meaning()}
    return {"name": cls.name, "phase": str(cls.phase), "doc": cls.doc(), **promise, "options": options}


def _entry(cls: type[Pass]) -> list[Any]:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    title = Text.assemble((cls.name, "bold"), f"  phase {cls.phase}, {cls.exactness}: {cls.exactness.meaning()}")
    table = Table(box=None, show_header=False, pad_edge=False)
    for o in cls.options():
        table.add_row(Text(_shown(o)), Text(o.kind), Text(o.doc))
    return [title, Padding(Text(cls.doc()), (0, 0, 0, 2)), Padding(table, (0, 0, 1, 4))]


def _shown(o: Option) -> str:
    """`group=32`; an empty text is quoted, as the pipeline reads it."""
    return f"{o.name}={spell(o.default) if o.default != '' else json.dumps('')}"
