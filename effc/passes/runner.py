"""Run passes on the structure of a module and hold each to its claims."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from effc.errors import EffcError
from effc.ir.core import Module
from effc.ir.diff import touched
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.verify import verify
from effc.passes.base import Notes, Pass, PassError

Watch = Callable[[str, Module], None]
"""Called with `input`, then with the name of each pass, and the module there."""


@dataclass(frozen=True)
class Step:
    """A pass that ran: the module on both sides, what it said, how long it took."""

    made_by: Pass
    before: Module
    after: Module
    notes: Notes
    seconds: float


def run(module: Module, passes: Iterable[Pass], watch: Watch = lambda name, module: None) -> list[Step]:
    """Every pass in turn; structure only."""
    watch("input", module)
    steps: list[Step] = []
    for one in passes:
        steps.append(step(one, module))
        module = steps[-1].after
        watch(one.name, module)
    return steps


def step(made_by: Pass, before: Module) -> Step:
    """One pass, checked: its promises, the verifier, the op kinds it may write, the round trip through text."""
    start = time.perf_counter()
    notes = Notes()
    made_by.requires(before)
    after = made_by.run(before, notes)
    check_module(made_by.name, after)
    check_writes(made_by, before, after)
    made_by.ensures(before, after)
    return Step(made_by, before, after, notes, time.perf_counter() - start)


def check_module(where: str, module: Module) -> None:
    """EffcError where the module is not legal or its dump does not read back."""
    faults = verify(module)
    if faults:
        raise PassError(f"{where}: left an illegal module\n" + "\n".join(f"  {fault}" for fault in faults))
    if parse(dump(module)) != module:
        raise PassError(f"{where}: the dump of the module does not read back as the module")


def check_writes(made_by: Pass, before: Module, after: Module) -> None:
    """PassError where ops were touched that the pass does not declare."""
    wrong = touched(before, after) - made_by.writes
    if wrong and "*" not in made_by.writes:
        allowed = ", ".join(sorted(made_by.writes)) or "no op"
        raise PassError(f"{made_by.name}: changed {', '.join(sorted(wrong))}, want {allowed} at most (see `writes`)")


def dumper(folder: Path) -> Watch:
    """Writes `00-input.effc`, `01-clean.effc`, ... as passes run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EffcError(f"--dump {folder}: {error.strerror}, want a folder to write to") from None
    count = iter(range(1000))

    def write(name: str, module: Module) -> None:
        (folder / f"{next(count):02d}-{name}.effc").write_text(dump(module))

    return write


def printer(write: Callable[[str], object]) -> Watch:
    """Gives the text of each module to `write`, under a comment that says whose it is."""
    return lambda name, module: (write(f"# after {name}\n{dump(module)}"), None)[1]


def both(*watches: Watch) -> Watch:
    """Calls each in turn."""

    def call(name: str, module: Module) -> None:
        for watch in watches:
            watch(name, module)

    return call
