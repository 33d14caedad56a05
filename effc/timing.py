"""Time an emitted program: `python -m effc.timing WEIGHTS < program.py` prints JSON.

A process that imports the runtime alone, as a server would: one model is in memory, without the compiler.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from effc.errors import EffcError
from effc.runtime.engine import Engine
from effc.runtime.generate import Stats, generate
from effc.runtime.program import Program
from effc.runtime.weights import load_params

PROMPT, GENERATED = 128, 65

ENOUGH, LEAST = 5.0, 1.0
"""Seconds after which no more runs are timed however few there were, and before which RUNS are not enough: small
models generate 64 tokens in 15 ms, and one such run says little."""

RUNS = 3


def run(source: str, weights: Path) -> dict[str, float]:
    """Greedy, one sequence, as `effc generate` does it; compiling is not counted."""
    space: dict[str, Any] = {"__name__": "effc_program"}
    exec(compile(source, "program.py", "exec"), space)
    program = Program(space["extend"], space["PARAMS"], space.get("CONTEXT"))
    engine = Engine(program, load_params(weights, program.params))
    prompt, generated = sizes(program.context)
    ids = [1 + i % 7 for i in range(prompt)]
    generate(engine, [ids], max_new_tokens=2)
    start, timed = time.perf_counter(), list[Stats]()
    while not timed or _more(len(timed), time.perf_counter() - start):
        timed.append(generate(engine, [ids], max_new_tokens=generated).stats)
    prefill, decode = [s.prefill_rate for s in timed], [s.decode_rate for s in timed]
    middle = {"prefill": statistics.median(prefill), "decode": statistics.median(decode)}
    return {**middle, "prompt": prompt, "generated": generated, "spread": statistics.pstdev(decode)}


def _more(runs: int, seconds: float) -> bool:
    return seconds < (ENOUGH if runs < RUNS else LEAST)


def sizes(context: int | None) -> tuple[int, int]:
    """Tokens of the prompt and to generate: fewer where the context is short."""
    limit = context or PROMPT + GENERATED
    generated = max(2, min(GENERATED, limit // 2))
    return max(1, min(PROMPT, limit - generated)), generated


if __name__ == "__main__":
    try:
        print(json.dumps(run(sys.stdin.read(), Path(sys.argv[1]))))
    except EffcError as error:
        sys.exit(str(error))
