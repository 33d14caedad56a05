"""What cascades are worth: python tests/bench/cascades.py ARTIFACT TEXT [--delta 0.05] [--tokens 32] [--svg FILE].

The artifact is one of speccascade{alpha=...} (any alpha, any rule): its large and its small model are taken, and every
deferral rule is run over some of its alphas beside plain speculation, each model alone, and plain cascades by token and
by whole answers. Prompts are windows of TEXT, which neither model should have learnt from: on the first part of them
alphas are certified (Learn-then-Test), on the rest quality is measured. Greedy; speeds are of one sequence, all ways in
turn, prompt by prompt, as medians of their ratios to plain speculation; forwards are of the prompts that quality is of.
With --judged FILE --rounds 0 quality comes first, and the race by itself later, when the machine is quiet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effc.calibration.consistency import LIKENESS
from effc.calibration.learn_then_test import certify
from effc.curves import HEAD, chart, line, svg, verdict
from effc.errors import EffcError
from effc.generator import Generator
from effc.passes.cascade import SpecCascade
from effc.passes.cascade.calibrate import SHORT
from effc.passes.cascade.texts import BATCH, Prompts, Speaking
from effc.passes.cascade.ways import ANSWER, TOKEN, Way, Ways, judge, race, tokens_of
from effc.passes.cascade.whole import GRID, Answered
from effc.runtime.deferral import GRIDS


@dataclass(frozen=True)
class Bench:
    """Prompts to certify on, prompts to test on, and how engines of the artifact's two models decode."""

    ways: Ways
    first: Prompts
    second: Prompts
    references: Sequence[list[int]]
    delta: float
    epsilon: float
    each: int
    certify: Sequence[str]
    known: Mapping[str, float]

    def rule(self, name: str) -> list[Way]:
        """Some alphas of a rule, the certified one among them."""
        if name in self.known:
            return self.ways.rule(name, self.each, self.known[name], "certified")
        if name not in self.certify:
            return self.ways.rule(name, self.each, None, "")
        texts = self.ways.deferring(name, gamma=SHORT)
        grid = GRIDS["chow" if name == TOKEN else name]
        found = certify(
            Speaking(texts, self.first).losses, len(self.first.rows), delta=self.delta, epsilon=self.epsilon, grid=grid
        )
        last = "nothing" if found.chosen is None else f"alpha {found.chosen:g}"
        tried = ", ".join(f"{t.setting:g}: {t.mean:.4f}" for t in found.tried)
        print(f"{name}: certified {last} at delta {self.delta:g} ({found.reason('alpha') or tried})", flush=True)
        return self.ways.rule(name, self.each, found.chosen, "certified")

    def answers(self) -> list[Way]:
        """Thresholds of whole answers; one engine says them all, so that only what is kept differs."""
        if ANSWER in self.known:
            return self.ways.answers(self.second, self.each, self.known[ANSWER], "certified")
        engine = self.ways.answering()
        first, full = (self.first.generate(engine, exits=threshold) for threshold in (0.0, 1.0))
        sure = [one for result in first if result.stats.answers for one in result.stats.answers.confidences]
        kept = Answered(sure, self.first.losses(tokens_of(first), tokens_of(full)))
        found = certify(kept.losses, len(sure), delta=self.delta, epsilon=self.epsilon, grid=GRID)
        last = "nothing" if found.chosen is None else f"threshold {found.chosen:g}, {kept.deferral(found.chosen):.0%}"
        print(f"{ANSWER}: certified {last} deferred; {found.reason()}", flush=True)
        return self.ways.answers(self.second, self.each, 1.0 if found.chosen is None else found.chosen, "certified")


def windows(generator: Generator, text: str, length: int, count: int, seed: int = 0) -> list[list[int]]:
    """Windows of a text without overlap, in an order by the seed; EffcError for too short a text."""
    ids = generator.tokenizer.rust.encode(text, add_special_tokens=False).ids
    places = np.random.default_rng(seed).permutation(len(ids) // length)[:count] * length
    if len(places) < count:
        raise EffcError(f"bench: {len(ids)} tokens of text, want {count} x {length}")
    return [ids[at : at + length] for at in places]


def main() -> None:
    parser = argparse.ArgumentParser(description="Every deferral rule beside plain speculation and each model alone.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--risk", action="store_true", help="certify the loss against what follows in the text")
    parser.add_argument("--loss", choices=tuple(LIKENESS), default="rouge_l")
    parser.add_argument("--prompts", type=int, default=400, help="to certify on")
    parser.add_argument("--test", type=int, default=200, help="prompts that quality is measured on")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each")
    parser.add_argument("--tokens", type=int, default=32, help="tokens after each")
    parser.add_argument("--batch", type=int, default=BATCH, help="prompts that are answered together")
    parser.add_argument("--gamma", type=int, default=0, help="drafts at most; the artifact's where that is not 0")
    parser.add_argument("--each", type=int, default=5, help="alphas of each rule on the curve")
    parser.add_argument("--rules", default=",".join((*GRIDS, TOKEN, ANSWER)))
    parser.add_argument("--certify", default=",".join((*GRIDS, TOKEN)), help="rules to certify; the others are drawn")
    parser.add_argument("--certified", default="", help="NAME=ALPHA,...: as this command certified before, not again")
    parser.add_argument("--timed", type=int, default=4, help="prompts that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="of the race; 0: none")
    parser.add_argument("--judged", type=Path, help="keep quality there; if it is there, only the race is run")
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    generator = Generator.open(options.artifact)
    check_drafting(generator)
    rows = windows(generator, options.text.read_text(), options.prompt + options.tokens, options.prompts + options.test)
    asked = SpecCascade(tokens=options.tokens, loss=options.loss, risk=options.risk)
    heads, rest = [row[: options.prompt] for row in rows], [row[options.prompt :] for row in rows]
    parts = slice(options.prompts), slice(options.prompts, None)
    first, second = (Prompts(heads[part], rest[part] if options.risk else None, asked, options.batch) for part in parts)
    ways = Ways.of(generator.engine, first, options.gamma)
    told = ways.base.program.decode
    print(f"a token of the small model costs {told['cost']:.3f} steps of the large one, gamma {told['gamma']}")
    known = {name: float(alpha) for name, alpha in (one.split("=") for one in options.certified.split(",") if one)}
    asked_of = options.delta, options.epsilon, options.each, options.certify.split(","), known
    run(Bench(ways, first, second, rest[parts[1]], *asked_of), options)


def run(bench: Bench, options: argparse.Namespace) -> None:
    """Certify, judge, race, print."""
    found = again(bench.ways, options.judged) if options.judged and options.judged.exists() else judged(bench, options)
    if options.rounds:
        race(found, bench.second.rows[: options.timed], options.tokens, options.rounds)
    rows = [way.json() for way in found]
    print(HEAD, *map(line, rows), sep="\n")
    if options.rounds:
        print(chart(rows), verdict(rows, options.delta), sep="\n")
    if options.svg:
        options.svg.write_text(svg(rows))


def judged(bench: Bench, options: argparse.Namespace) -> list[Way]:
    """All ways with their quality; kept in a file where one is asked for."""
    found = bench.ways.plain()
    for name in options.rules.split(","):
        found += bench.answers() if name == ANSWER else bench.rule(name)
    full = tokens_of(bench.second.generate(found[0].engine))
    for way in found:
        judge(way, bench.second, full, bench.references)
    if options.judged:
        options.judged.write_text(json.dumps([way.json() for way in found]))
    return found


def again(ways: Ways, file: Path) -> list[Way]:
    """Ways as they were judged, one engine a name."""
    engines = {way.name: way.engine for way in ways.plain()} | {ANSWER: ways.answering()}
    found: list[Way] = []
    for row in json.loads(file.read_text()):
        name, setting = row["way"], row["setting"]
        engine = engines.setdefault(name, engines.get(name) or ways.deferring(name))
        how = {} if setting is None else {"exits" if name == ANSWER else "alpha": setting}
        told = {k: row[k] for k in ("deferral", "acceptance", "large_calls", "small_calls", "emitted") if k in row}
        found.append(Way(name, setting, engine, how, row["mark"], row["loss"], row["score"], told))
    return found


def check_drafting(generator: Generator) -> None:
    """SystemExit for an artifact without a small model."""
    if not generator.engine.program.decode.get("drafter"):
        raise SystemExit(EffcError("bench: the artifact has no small model, want one of speccascade or cascade"))


if __name__ == "__main__":
    main()
