"""Tokens a second of an artifact's program, measured in a process of its own: `python -m effc.speed FOLDER`.

A process of its own, so that one model is in memory at a time and none shares the other's caches.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from effc.artifact import MODEL, WEIGHTS, read_module
from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.report import Speed
from effc.runtime.engine import Engine
from effc.runtime.generate import Stats, generate
from effc.runtime.weights import load_params

PROMPT, GENERATED = 128, 65

ENOUGH = 5.0
"""Seconds after which no more runs are timed; there are at least one and at most RUNS."""

RUNS = 3


def measure(folder: Path) -> Speed:
    """In a new process; EffcError with its last words where it failed."""
    command = [sys.executable, "-m", "effc.speed", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise EffcError(f"measuring tokens/s: {words[-1]}")
    return Speed(**json.loads(done.stdout.strip().splitlines()[-1]))


def run(folder: Path) -> Speed:
    """In this process: greedy, one sequence, as `effc generate` does it; the first run warms up."""
    program = load_program(emit(read_module(folder / MODEL)))
    engine = Engine(program, load_params(folder / WEIGHTS, program.params))
    prompt, generated = sizes(program.context)
    ids = [1 + i % 7 for i in range(prompt)]
    generate(engine, [ids], max_new_tokens=2)
    start, timed = time.perf_counter(), list[Stats]()
    while len(timed) < RUNS and (not timed or time.perf_counter() - start < ENOUGH):
        timed.append(generate(engine, [ids], max_new_tokens=generated).stats)
    prefill, decode = [s.prefill_rate for s in timed], [s.decode_rate for s in timed]
    spread = statistics.pstdev(decode)
    return Speed(statistics.mean(prefill), statistics.mean(decode), prompt, generated, spread)


def sizes(context: int | None) -> tuple[int, int]:
    """Tokens of the prompt and to generate: fewer where the context is short."""
    limit = context or PROMPT + GENERATED
    generated = max(2, min(GENERATED, limit // 2))
    return max(1, min(PROMPT, limit - generated)), generated


if __name__ == "__main__":
    try:
        print(json.dumps(run(Path(sys.argv[1])).json()))
    except EffcError as error:
        sys.exit(str(error))
