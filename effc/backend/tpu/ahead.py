"""Compile prefill, decode and verification of a module for a TPU that need not be there; tables of what came of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from effc.backend.to_python import emit
from effc.backend.tpu.child import environment
from effc.backend.tpu.estimate import Estimate, KernelTime, estimate
from effc.backend.tpu.hardware import generation
from effc.errors import EffcError
from effc.ir.core import Module
from effc.runtime.kernels.generations import Generation

CALLS = {"decode": 1, "verify": 4, "prefill": 128}
"""Tokens a sequence in each program."""

EXITS = {"exits": 1}
"""The program beside them where tokens may leave early: everything that may run is counted."""


@dataclass(frozen=True)
class Compiled:
    """What each program of a module costs on a target."""

    target: str
    batch: int
    programs: list[Estimate]

    def json(self) -> dict[str, Any]:
        return {"target": self.target, "batch": self.batch, "programs": [p.json() for p in self.programs]}

    def table(self) -> Group:
        """For the terminal."""
        return Group(*(part for program in self.programs for part in _shown(program)), Text(_LEAVES_OUT))


_LEAVES_OUT = (
    "Estimated from the compiler's static schedules and HBM bytes; "
    "waits on DMA, instruction fetch and other chips are left out."
)


def compile_ahead(module: Module, target: str, *, batch: int = 1, context: int = 1024) -> Compiled:
    """EffcError where the TPU compiler is not installed or refuses a program."""
    chip = generation(target)
    if importlib.util.find_spec("libtpu") is None:
        raise EffcError("compile: the TPU compiler is not installed, want it: pip install 'effc[tpu]'")
    source = emit(module)
    with ThreadPoolExecutor(os.cpu_count()) as side_by_side:
        early = module.decode is not None and module.decode.strategy == "early"
        names = [*CALLS, *(EXITS if early else ())]
        made = side_by_side.map(lambda name: _one(source, name, target, chip, batch, context), names)
        return Compiled(target, batch, list(made))


def _one(source: str, name: str, target: str, chip: Generation, batch: int, context: int) -> Estimate:
    """One program in a process of its own: the compiler names a kernel's dump by the kernel alone."""
    with tempfile.TemporaryDirectory(prefix="effc-tpu-") as folder:
        request = {
            "program": source, "target": target, "batch": batch, "context": context,
            "calls": {name: (CALLS | EXITS)[name]}, "dump": folder,
        }  # fmt: skip
        return estimate(name, _asked(request, Path(folder))[name], chip)


def _asked(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "effc.backend.tpu.child", str(folder)],
        input=json.dumps(request), capture_output=True, text=True, check=False,
        env={**os.environ, **environment(folder)},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EffcError(f"compile: {request['target']}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


_COLUMNS = (
    "calls", "HBM MB", "VMEM MB", "cycles", "HBM cycles", "ratio", "binds", "spills", "compute us",
    "memory us", "us",
)  # fmt: skip


def _shown(program: Estimate) -> list[Any]:
    table = Table(title=_title(program), title_justify="left")
    table.add_column("kernel", overflow="fold", min_width=20)
    for heading in _COLUMNS:
        table.add_column(heading, justify="left" if heading == "binds" else "right")
    for k in program.kernels:
        table.add_row(
            k.name, str(k.calls), f"{k.hbm_bytes / 1e6:.2f}", f"{k.vmem_bytes / 1e6:.1f}", k.why or _cycles(k),
            f"{k.hbm_cycles:.0f}", "-" if k.ratio is None else f"{k.ratio:.2f}", k.binding, str(k.spills),
            f"{1e6 * k.compute_seconds:.1f}", f"{1e6 * k.memory_seconds:.1f}", f"{1e6 * k.seconds:.1f}",
        )  # fmt: skip
    return [table, *(Text(line) for line in _lines(program))]


def _cycles(kernel: KernelTime) -> str:
    """Of a steady step, and what other steps do besides, spread over all."""
    return f"{kernel.cycles}" + (f"+{kernel.rare:.0f}" if kernel.rare >= 1 else "")


def _title(program: Estimate) -> str:
    rate = program.tokens / program.seconds
    return f"{program.name}: {program.tokens} tokens in {1e6 * program.seconds:.0f} us, {rate:.0f} tokens/s estimated"


def _share(program: Estimate) -> str:
    if not program.weight_bytes:
        return "no kernel reads weights: XLA's own reckoning, which memory does not bound"
    return f"{program.roofline:.0%} of the speed at which HBM gives the weights, {program.streamed:.0%} with caches"


def _lines(program: Estimate) -> list[str]:
    others, share = sum(program.ops.values()), program.around_seconds / program.seconds
    fits = "fits" if program.fits else "does NOT fit"
    lines = [
        f"around the kernels: {others} ops of XLA's and beginning each kernel, {share:.0%} of the time",
        f"{_share(program)}; {program.argument_bytes / 1e6:.0f} MB of arguments, "
        f"{program.temporary_bytes / 1e6:.0f} MB temporary: {fits}",
    ]
    if program.name in EXITS:
        lines.append("all layers and exits, and what skipped layers keep, are counted: what a token runs is less")
    if program.copies:
        lines.append(f"weights are copied: {len(program.copies)} times, e.g. {program.copies[0]}")
    return lines
