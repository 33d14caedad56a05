"""Speed of an artifact against llama.cpp, in turn: python tests/bench/llama_cpp.py ARTIFACT LLAMA_BENCH GGUF.

Both on the same number of threads. Prefill of 512 tokens against pp512, 128 tokens after a prompt of 32 against
tg128; medians over the rounds and of the ratios. Then what verifying k tokens costs, T(k)/T(1).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

import numpy as np

from effc.artifact import MODEL, WEIGHTS, read_module
from effc.backend.to_python import emit, load_program
from effc.measure import verification
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.weights import load_params

PROMPT, SHORT, NEW = 512, 32, 128


def theirs(bench: Path, gguf: Path, threads: int) -> dict[str, float]:
    """Tokens a second of llama-bench, one repetition."""
    command = [str(bench), "-m", str(gguf), "-t", str(threads), "-p", str(PROMPT), "-n", str(NEW), "-r", "1"]
    done = subprocess.run([*command, "-o", "json"], check=True, capture_output=True, text=True)
    rows = json.loads(done.stdout)
    return {"pp" if row["n_prompt"] else "tg": row["avg_ts"] for row in rows}


def ours(engine: Engine, vocab: int) -> dict[str, float]:
    """The same of ours."""
    ids = np.random.default_rng(0).integers(0, vocab, PROMPT).tolist()
    pp = generate(engine, [ids], max_new_tokens=1, stop_ids=()).stats.prefill_rate
    tg = generate(engine, [ids[:SHORT]], max_new_tokens=NEW + 1, stop_ids=()).stats.decode_rate
    return {"pp": pp, "tg": tg}


def main() -> None:
    parser = argparse.ArgumentParser(description="An artifact against llama.cpp.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("bench", type=Path, help="llama.cpp's llama-bench")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    program = load_program(emit(read_module(options.artifact / MODEL)))
    engine = Engine(program, load_params(options.artifact / WEIGHTS, program.params))
    threads, vocab = len(os.sched_getaffinity(0)), 1000
    ours(engine, vocab)  # compiles
    pairs = [(ours(engine, vocab), theirs(options.bench, options.gguf, threads)) for _ in range(options.rounds)]
    for key, name in (("pp", f"prefill of {PROMPT}"), ("tg", f"decode of {NEW}")):
        mine, other = (statistics.median(pair[i][key] for pair in pairs) for i in (0, 1))
        ratio = statistics.median(a[key] / b[key] for a, b in pairs)
        print(f"{name}: effc {mine:.0f}, llama.cpp {other:.0f} tokens/s, ratio {ratio:.2f}")
    curve = ", ".join(f"{k}: {ratio:.2f}" for k, ratio in verification(engine).items())
    print(f"T(k)/T(1): {curve}")


if __name__ == "__main__":
    main()
