"""What a drafter is worth by wall clock: python tests/bench/drafters.py ARTIFACT [--rounds 3] [--new 128].

An artifact with a drafter against itself without, greedy, one text at a time, in turn; medians of the ratios of
decoding speed. `quoting`: the answer repeats much of the prompt (copy, correct, rename, quote). `free`: it does not.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from effc.errors import EffcError
from effc.generator import Generator
from effc.passes.draft.plan import measure
from effc.runtime.engine import Engine
from effc.runtime.generate import Drafted, Stats, generate

STORY = (
    "The lighthouse stood on a narrow rock two miles from the harbour. Every evening at six the keeper climbed the one "
    "hundred and forty steps to the lantern, trimmed the wick and wound the clockwork that turned the lens. In thirty "
    "years he had missed only one night, when a storm carried away the lower door and the sea came up the stairs."
)
REPORT = (
    "The museum will be closed on Monday for repairs to the roof. Visitors who hold tickets for that day may use them "
    "on any other day of the month, or ask for their money back at the main desk. The garden and the small cafe at the "
    "south gate stay open, and the evening lecture on Roman glass takes place in the town library instead."
)
CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)

def variance(values):
    centre = mean(values)
    total = 0
    for value in values:
        total += (value - centre) ** 2
    return total / len(values)
"""
QUOTING = (
    f"Repeat the following text word for word:\n\n{STORY}",
    f"Fix the typos in this text and write out the corrected text:\n\n{STORY.replace('harbour', 'harbuor')}",
    f"Rewrite this code with the word `value` renamed to `item`:\n\n{CODE}",
    f"Summarize this text by quoting its most important sentences:\n\n{STORY}",
    f"Write this notice again with Tuesday in place of Monday:\n\n{REPORT}",
    f"Summarize this notice by quoting its most important sentences:\n\n{REPORT}",
)
FREE = (
    "Explain how a violin makes its sound.",
    "Write a short story about a gardener who finds an old key.",
    "What should I think of before I adopt a parrot?",
    "Give me some advice on how to prepare for a long train journey.",
    "Why do leaves change their colour in autumn?",
    "Describe what a typical day of a glass blower could look like.",
    "What is the difference between weather and climate?",
    "Write a speech for the opening of a village fair.",
)


@dataclass
class Row:
    """One set of prompts: speeds of both ways, in turn, and what drafts came to."""

    name: str
    plain: list[float] = field(default_factory=list[float])
    drafts: list[float] = field(default_factory=list[float])
    told: list[Drafted] = field(default_factory=list[Drafted])
    same: int = 0
    texts: int = 0

    def __str__(self) -> str:
        ratio = statistics.median(b / a for a, b in zip(self.plain, self.drafts, strict=True))
        calls, emitted = sum(d.calls for d in self.told), sum(d.emitted for d in self.told)
        speeds = f"{statistics.median(self.plain):8.1f}  {statistics.median(self.drafts):8.1f}  x{ratio:.3f}"
        seconds = sum(d.draft_seconds for d in self.told), sum(d.verify_seconds for d in self.told)
        share = seconds[0] / (sum(seconds) or 1)
        return (
            f"{self.name:8}  {speeds}  {emitted / max(1, calls):11.2f}  {share:8.0%}  {self.same:3}/{self.texts:<3}  "
            f"{' '.join(f'{share:.2f}' for share in _by_position(self.told))}"
        )


def _by_position(told: Sequence[Drafted]) -> list[float]:
    """Of the drafts sent, the share accepted at each position."""
    drafted = [sum(at) for at in zip(*(d.drafted_at for d in told), strict=True)]
    accepted = [sum(at) for at in zip(*(d.accepted_at for d in told), strict=True)]
    return [a / d for a, d in zip(accepted, drafted, strict=True) if d]


def measured(name: str, prompts: Sequence[Sequence[int]], plain: Engine, drafts: Engine, rounds: int, new: int) -> Row:
    """Each prompt once to warm up, then `rounds` times both ways in turn."""
    row = Row(name)
    for prompt in prompts:
        one, two = (generate(engine, [prompt], max_new_tokens=new) for engine in (plain, drafts))
        row.texts, row.same = row.texts + 1, row.same + (one.tokens == two.tokens)
        for _ in range(rounds):
            one, two = (generate(engine, [prompt], max_new_tokens=new) for engine in (plain, drafts))
            if one.stats.decode_rate:
                _noted(row, one.stats, two.stats)
    return row


def _noted(row: Row, plain: Stats, drafts: Stats) -> None:
    row.plain.append(plain.decode_rate)
    row.drafts.append(drafts.decode_rate)
    if drafts.draft:
        row.told.append(drafts.draft)


def retimed(engine: Engine) -> Engine:
    """With the costs of this machine as it is now: an artifact made on a busy one holds those of a busy one."""
    assert engine.speculation is not None
    costs = measure(engine, engine.speculation.widths.most)
    curve = ", ".join(f"{cost:.2f}" for cost in costs.curve)
    print(f"T(1) {1e3 * costs.step:.2f} ms, T(k)/T(1) {curve}; a draft token {costs.draft:.3f}")
    decode = {**engine.program.decode, "curve": costs.curve, "cost": costs.draft}
    return Engine(replace(engine.program, decode=decode), engine.params, engine.eos)


def main() -> None:
    parser = argparse.ArgumentParser(description="An artifact with a drafter against itself without.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--retime", action="store_true", help="go by costs as they are now, not as optimize found them")
    parser.add_argument("--set", choices=("quoting", "free"), help="one set of prompts; both without")
    options = parser.parse_args()
    generator = Generator.open(options.artifact)
    drafts = generator.engine
    if drafts.speculation is None:
        raise SystemExit(EffcError(f"{options.artifact}: it has no drafter that runs, want one"))
    if options.retime:
        drafts = retimed(drafts)
    plain = Engine(replace(drafts.program, decode={}), drafts.params, drafts.eos)
    print("prompts      plain    drafts  ratio  tokens/call  drafting  same     accepted by position")
    for name, texts in (("quoting", QUOTING), ("free", FREE)):
        if options.set in (None, name):
            prompts = [generator.encode(text, chat=True) for text in texts]
            print(measured(name, prompts, plain, drafts, options.rounds, options.new), flush=True)


if __name__ == "__main__":
    main()
