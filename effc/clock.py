"""How long each step takes, and a progress bar while it does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from effc.errors import EffcError
from effc.memory import give_back, peak_bytes

Advance = Callable[[int], None]


class Clock:
    """Seconds by step; draws on `console` where there is one. EffcError where memory passed `limit` bytes (0: none)."""

    def __init__(self, console: Console | None = None, limit: int = 0):
        self.console, self.limit = console, limit
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str, total: float | None = None) -> Iterator[Advance]:
        """Time the body; what it yields advances the bar towards `total`. Memory is given back at its end."""
        with self.timed(name), self._bar(name, total) as advance:
            yield self._held(name, advance)

    def _held(self, name: str, advance: Advance) -> Advance:
        """`advance`, that looks at memory too."""

        def call(count: int) -> None:
            self._hold(name)
            advance(count)

        return call

    def _hold(self, name: str) -> None:
        if self.limit and peak_bytes() > self.limit:
            held, limit = (f"{count / 1e9:.2f} GB" for count in (peak_bytes(), self.limit))
            raise EffcError(f"{name}: {held} of memory were held, want {limit} at most (--max-memory)")

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """As `step`, for a body that draws bars of its own."""
        start = time.perf_counter()
        yield
        give_back()
        self._hold(name)
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
