"""What early exits are worth on a text: python tests/bench/exits.py ARTIFACT TEXT [--prompts 500] [--rounds 3].

An artifact of `calm` against itself without exits, greedy. Prompts are windows of TEXT, which nothing should have
learnt from or been calibrated on: the mean loss at the certified threshold is to lie under delta there. Speeds are of
one sequence, both ways in turn, prompt by prompt, as medians of their ratios; then of eight at once, each row leaving
by itself or all waiting for the least sure. --threshold tries another one, --grid some that are not certified too.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effc.calibration.consistency import LIKENESS, textual
from effc.errors import EffcError
from effc.generator import Generator
from effc.opened import open_model
from effc.passes.calm.calibrate import BATCH
from effc.passes.calm.side import TOGETHER, altered
from effc.passes.context import Model
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.leaving import Left

GRID = (0.995, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4, 0.0)


def windows(ids: Sequence[int], head: Sequence[int], count: int, length: int) -> list[list[int]]:
    """Windows of a text without overlap, in an order of their own."""
    body = length - len(head)
    places = np.random.default_rng(1).permutation(len(ids) // body)[:count] * body
    return [[*head, *ids[at : at + body]] for at in places.tolist()]


def said(engine: Engine, prompts: Sequence[list[int]], tokens: int, threshold: float) -> tuple[list[list[int]], Left]:
    """What follows each prompt, and the layers that took."""
    out, counts = list[list[int]](), Counter[int]()
    for start in range(0, len(prompts), BATCH):
        result = generate(engine, prompts[start : start + BATCH], max_new_tokens=tokens, exits=threshold)
        out += result.tokens
        counts.update(result.stats.exits.by_layers if result.stats.exits else {})
    return out, Left(counts)


def ratio(engine: Engine, batches: Sequence[list[list[int]]], tokens: int, threshold: float, rounds: int) -> str:
    """Tokens/s with exits and without, and the median of the ratios."""
    rates: dict[float, list[float]] = {1.0: [], threshold: []}
    for number in range(rounds + 1):
        for batch in batches:
            for at, found in rates.items():
                stats = generate(engine, batch, max_new_tokens=tokens, exits=at, stop_ids=()).stats
                found += [stats.decode_rate] if number else []  # the first round compiles
    full, early = rates[1.0], rates[threshold]
    gain = statistics.median(b / a for a, b in zip(full, early, strict=True))
    return f"{statistics.median(full):.0f} -> {statistics.median(early):.0f} tokens/s, x{gain:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="An artifact of calm against itself without exits.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each")
    parser.add_argument("--timed", type=int, default=8, help="prompts that are timed one by one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threshold", type=float, help="instead of the certified one")
    parser.add_argument("--grid", action="store_true", help="loss and layers at other thresholds too")
    options = parser.parse_args()
    generator = Generator.open(options.artifact)
    engine, exits = generator.engine, generator.engine.exits
    if exits is None:
        raise SystemExit(EffcError(f"{options.artifact}: no exits, want an artifact of calm"))
    decode = engine.program.decode
    delta, of = float(decode.get("delta", 0.1)), str(decode.get("of", "rouge_l"))
    threshold, tokens = options.threshold or exits.threshold, exits.tokens
    ids, head = generator.encode(options.text.read_text()), generator.encode("")
    prompts = windows(ids[len(head) :], head, options.prompts, options.prompt)
    full, _ = said(engine, prompts, tokens, 1.0)
    print(
        f"{len(prompts)} prompts of {options.text.name}, {tokens} tokens after each; loss is 1 - {of}, delta {delta:g}"
    )
    for at in (threshold, *(GRID if options.grid else ())):
        early, left = said(engine, prompts, tokens, at)
        losses = [textual(e, f, LIKENESS[of]) for e, f in zip(early, full, strict=True)]
        error = statistics.pstdev(losses) / len(losses) ** 0.5
        same = sum(e == f for e, f in zip(early, full, strict=True)) / len(full)
        shares = ", ".join(f"{count / left.tokens:.1%} after {n}" for n, count in left.by_layers.items())
        print(
            f"threshold {at:g}: mean loss {statistics.mean(losses):.4f} +- {error:.4f}, {same:.1%} of texts the same; "
            f"{left.average:.2f} layers a token: {shares}", flush=True,
        )  # fmt: skip
    alone = [[prompt] for prompt in prompts[: options.timed]]
    print("one sequence:", ratio(engine, alone, tokens, threshold, options.rounds), flush=True)
    opened, batch = open_model(options.artifact), [prompts[:TOGETHER]]
    for rows in ("masked", "wait"):
        model = Model.of(altered(opened.module, {"rows": rows}), opened.store)
        told = ratio(Engine(model.program, model.params), batch, tokens, threshold, 4 * options.rounds)
        print(f"{TOGETHER} at once, rows={rows}: {told}", flush=True)


if __name__ == "__main__":
    main()
