"""How long each step takes, and a progress bar while it does."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[int], None]


class Clock:
    """Seconds by step; draws on `console` where there is one."""

    def __init__(self, console: Console | None = None):
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str, total: float | None = None) -> Iterator[Advance]:
        """Time the body; what it yields advances the bar towards `total`."""
        start = time.perf_counter()
        with self._bar(name, total) as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if self.console:
            self.console.print(f"{name:<10} {self.seconds[name]:6.1f} s", highlight=False)

    @contextlib.contextmanager
    def _bar(self, name: str, total: float | None) -> Iterator[Advance]:
        if self.console is None or not self.console.is_terminal:
            yield lambda count: None
            return
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda count: progress.advance(task, count)


def peak_bytes() -> int:
    """The most memory this process held, or any it started and waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whose) * unit
