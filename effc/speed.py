"""Tokens a second of an artifact's program, measured in a process of its own: `python -m effc.speed FOLDER`.

A process of its own, so that one model is in memory at a time and none shares the other's caches.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from effc.artifact import MODEL, WEIGHTS, read_module
from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.report import Speed
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.weights import load_params

PROMPT, GENERATED, RUNS = 128, 65, 3


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
    all_stats = [generate(engine, [ids], max_new_tokens=generated).stats for _ in range(RUNS + 1)]
    prefill = [stats.prefill_rate for stats in all_stats[1:]]
    decode = [stats.decode_rate for stats in all_stats[1:]]
    mean, spread = statistics.mean(decode), statistics.pstdev(decode)
    return Speed(statistics.mean(prefill), mean, prompt, generated, spread)


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
