"""How long each step takes, and a progress bar while it does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from effc.memory import give_back

Advance = Callable[[int], None]


class Clock:
    """Seconds by step; draws on `console` where there is one."""

    def __init__(self, console: Console | None = None):
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str, total: float | None = None) -> Iterator[Advance]:
        """Time the body; what it yields advances the bar towards `total`. Memory is given back at its end."""
        with self.timed(name), self._bar(name, total) as advance:
            yield advance

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """As `step`, for a body that draws bars of its own."""
        start = time.perf_counter()
        yield
        give_back()
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
