"""Many runs at once: each goes on until it needs a model, then all their calls are answered together.

Schedules differ in speed alone. What a site draws hangs on its key, and an answer on its call, not on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from effc.programs.calls import Answer, Call, answer_all
from effc.programs.execution import Execution, Until
from effc.programs.program import Site
from effc.programs.trace import Record


def never(execution: Execution, item: Site | Record) -> bool:
    """To the end."""
    return False


def run(executions: Sequence[Execution], until: Until = never, *, together: bool = True) -> None:
    """All of them to their ends, or to where `until` pauses them; together False: one after another."""
    if not together:
        for execution in executions:
            run([execution], until)
        return
    answers: dict[int, list[Answer] | None] = {i: None for i, e in enumerate(executions) if not e.done}
    while answers:
        asked = {i: executions[i].advance(given, until) for i, given in answers.items()}
        answers = _answered({i: calls for i, calls in asked.items() if calls is not None})


def _answered(asked: dict[int, list[Call]]) -> dict[int, list[Answer] | None]:
    """The answers to each execution's calls, all calls asked in one go."""
    found = iter(answer_all([call for calls in asked.values() for call in calls]))
    return {i: [next(found) for _ in calls] for i, calls in asked.items()}
