"""What cascades are worth: python tests/bench/cascades.py ARTIFACT TEXT [--delta 0.05] [--tokens 32] [--svg FILE].

The artifact is one of speccascade{alpha=...} (any alpha, any rule): its large and its small model are taken, and every
deferral rule is run over some of its alphas beside plain speculation, each model alone, and plain cascades by token and
by whole answers. Prompts are windows of TEXT, which neither model should have learnt from: on the first part of them
alphas are certified (Learn-then-Test), on the rest quality is measured. Greedy; speeds are of one sequence, all ways in
turn, prompt by prompt, as medians of their ratios to plain speculation; forwards are of the prompts that quality is of.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from effc.calibration.consistency import LIKENESS
from effc.calibration.learn_then_test import certify
from effc.errors import EffcError
from effc.generator import Generator
from effc.passes.cascade import SpecCascade
from effc.passes.cascade.calibrate import SHORT
from effc.passes.cascade.texts import Prompts, Speaking, counts
from effc.passes.cascade.whole import GRID, Answered
from effc.passes.draft.plan import measure
from effc.runtime.deferral import GRIDS
from effc.runtime.engine import Engine
from effc.runtime.generate import Drafted, generate

TOKEN, ANSWER = "token", "answer"
"""Plain cascades: the small model speaks while it is sure of each token, or for whole answers."""

ALONE = 16
"""Tokens that the small model says before the large one reads them, in a plain cascade by token."""


@dataclass
class Way:
    """A way to decode: engine, alpha or threshold of it; what it came to."""

    name: str
    setting: float | None
    engine: Engine
    how: dict[str, float] = field(default_factory=dict[str, float])
    certified: bool = False
    loss: float = 0.0
    score: float = 0.0
    told: dict[str, float] = field(default_factory=dict[str, float])
    rates: list[float] = field(default_factory=list[float])
    speed: float = 0.0

    def row(self) -> str:
        told = self.told
        shares = [f"{told[n]:9.1%}" if n in told else " " * 8 + "-" for n in ("deferral", "acceptance")]
        calls = [f"{told[n]:7.0f}" if n in told else " " * 6 + "-" for n in ("large_calls", "small_calls")]
        setting = "" if self.setting is None else f"{self.setting:g}"
        mark = "yes" if self.certified else ""
        rate = f"{statistics.median(self.rates):8.1f}" if self.rates else " " * 7 + "-"
        return (
            f"{self.name:12} {setting:>7} {mark:>9} {self.loss:8.4f} {self.score:8.4f} {' '.join(shares)} "
            f"{' '.join(calls)} {rate}  x{self.speed:.3f}"
        )


HEAD = (
    f"{'way':12} {'alpha':>7} {'certified':>9} {'loss':>8} {'score':>8} {'deferred':>9} {'accepted':>9} "
    f"{'large':>7} {'small':>7} {'tokens/s':>8}  to plain speculation"
)


@dataclass(frozen=True)
class Bench:
    """Prompts to certify on, prompts to test on, and how engines of the artifact's two models decode."""

    base: Engine
    first: Prompts
    second: Prompts
    references: Sequence[list[int]]
    delta: float
    epsilon: float
    each: int

    def engine(self, **decode: Any) -> Engine:
        """Decoding so; None takes a setting away."""
        bare = {"rule", "alpha", "delta", "tokens", "level", "threshold", "confidence"}
        told = {k: v for k, v in self.base.program.decode.items() if k not in bare} | decode
        program = replace(self.base.program, decode={k: v for k, v in told.items() if v is not None})
        return Engine(program, self.base.params, self.base.eos)

    def models(self) -> tuple[Way, Way, Way]:
        """Each model alone, and plain speculation."""
        answers = self.engine(strategy="cascade", level="sequence", threshold=0.5, confidence="mean")
        large = Engine(replace(self.base.program, decode={}), self.base.params, self.base.eos)
        return Way("large", None, large), Way("small", None, answers.small), Way("speculation", None, self.engine())

    def rule(self, name: str) -> list[Way]:
        """Some alphas of a rule, the certified one among them."""
        alone = {"strategy": "cascade", "level": "token", "gamma": ALONE} if name == TOKEN else {}
        rule = "chow" if name == TOKEN else name
        engine = self.engine(rule=rule, alpha=0.5, **alone)
        texts = self.engine(rule=rule, alpha=0.5, **{**alone, "gamma": SHORT})
        found = certify(
            Speaking(texts, self.first).losses, len(self.first.rows), delta=self.delta, epsilon=self.epsilon,
            grid=GRIDS[rule],
        )  # fmt: skip
        last = "nothing" if found.chosen is None else f"alpha {found.chosen:g}"
        tried = ", ".join(f"{t.setting:g}: {t.mean:.4f}" for t in found.tried)
        print(f"{name}: certified {last} at delta {self.delta:g} ({found.reason('alpha') or tried})", flush=True)
        picked = sorted(
            {*_some(GRIDS[rule], self.each), *(t.setting for t in found.tried if t.setting == found.chosen)}
        )
        return [Way(name, alpha, engine, {"alpha": alpha}, alpha == found.chosen) for alpha in picked]

    def answers(self) -> list[Way]:
        """Thresholds of whole answers; one engine says them all, so that only what is kept differs."""
        engine = self.engine(strategy="cascade", level="sequence", threshold=0.5, confidence="mean")
        first, full = (self.first.generate(engine, exits=threshold) for threshold in (0.0, 1.0))
        sure = [one for result in first if result.stats.answers for one in result.stats.answers.confidences]
        lost = self.first.losses(_tokens(first), _tokens(full))
        kept = Answered(sure, lost)
        found = certify(kept.losses, len(sure), delta=self.delta, epsilon=self.epsilon, grid=GRID)
        last = "nothing" if found.chosen is None else f"threshold {found.chosen:g}, {kept.deferral(found.chosen):.0%}"
        print(f"{ANSWER}: certified {last} deferred; {found.reason()}", flush=True)
        chosen = 1.0 if found.chosen is None else found.chosen
        spread = [round(float(x), 3) for x in np.quantile(sure, np.linspace(0, 1, self.each))]
        picked = sorted({*spread, chosen}, reverse=True)
        return [Way(ANSWER, one, engine, {"exits": one}, one == found.chosen) for one in picked]

    def judge(self, way: Way, full: Sequence[list[int]]) -> None:
        """Quality and counts on the prompts to test on; loss is against the texts `full`, score what follows."""
        results = self.second.generate(way.engine, **way.how)
        said = _tokens(results)
        way.loss = statistics.mean(self.second.losses(said, full))
        likeness = LIKENESS[self.second.asked.loss]
        way.score = statistics.mean(likeness(one, other) for one, other in zip(said, self.references, strict=True))
        drafts: list[Drafted] = [r.stats.draft for r in results if r.stats.draft]
        answers = [r.stats.answers for r in results if r.stats.answers]
        if drafts:
            way.told = counts(drafts)
            if drafts[0].deferral is None:
                del way.told["deferral"]
        elif answers:
            late = [one for told in answers for one in told.deferred]
            way.told = {"deferral": sum(late) / len(late)}
            way.told |= {n: sum(getattr(told, n) for told in answers) for n in ("large_calls", "small_calls")}


def _tokens(results: Sequence[Any]) -> list[list[int]]:
    return [tokens for result in results for tokens in result.tokens]


def _some(grid: Sequence[float], count: int) -> list[float]:
    """Evenly by place, both ends among them."""
    return [grid[int(i)] for i in np.linspace(0, len(grid) - 1, count)]


def race(ways: Sequence[Way], prompts: Sequence[list[int]], tokens: int, rounds: int) -> None:
    """Tokens a second of each, in turn; speed over plain speculation's at the same prompt of the same round."""
    for number in range(rounds + 1):
        for prompt in prompts:
            for way in ways:
                told = generate(way.engine, [prompt], max_new_tokens=tokens, stop_ids=(), **way.how)  # type: ignore[arg-type]
                if number:
                    way.rates.append(told.stats.decode_rate)
    plain = next(way for way in ways if way.name == "speculation")
    for way in ways:
        way.speed = statistics.median(b / a for a, b in zip(plain.rates, way.rates, strict=True))


def verdict(ways: Sequence[Way], delta: float) -> str:
    """Whether a certified rule beats plain speculation in this run."""
    found = sorted((way for way in ways if way.certified), key=lambda way: -way.speed)
    best = next((way for way in found if way.speed > 1 and way.name not in (TOKEN, ANSWER)), None)
    if best:
        return (
            f"at a certified loss of {delta:g} {best.name}, alpha {best.setting:g}, is x{best.speed:.3f} of speculation"
        )
    return f"at a certified loss of {delta:g} no rule is faster than plain speculation"


# -- plots --------------------------------------------------------------------------------------------------


def chart(ways: Sequence[Way], wide: int = 72, high: int = 20) -> str:
    """Loss upwards from none at the top, speed to the right; a letter a way."""
    worst, most = max(way.loss for way in ways) or 1.0, max(way.speed for way in ways) or 1.0
    rows = [[" "] * (wide + 1) for _ in range(high + 1)]
    names = list(dict.fromkeys(way.name for way in ways))
    for way in ways:
        rows[round(high * way.loss / worst)][round(wide * way.speed / most)] = chr(ord("a") + names.index(way.name))
    lines = [f"{worst * i / high:6.3f} |{''.join(row).rstrip()}" for i, row in enumerate(rows)]
    lines.append(f"  loss +{'-' * wide} speed over plain speculation, to x{most:.2f}")
    return "\n".join([*lines, "  ".join(f"{chr(ord('a') + i)} {name}" for i, name in enumerate(names))])


COLOURS = ("#333", "#999", "#c00", "#06c", "#0a0", "#f80", "#909", "#088", "#a60", "#c69", "#579", "#690")


def svg(ways: Sequence[Way]) -> str:
    """The same as a picture."""
    worst, most = max(way.loss for way in ways) or 1.0, max(way.speed for way in ways) or 1.0
    names, out = list(dict.fromkeys(way.name for way in ways)), list[str]()
    for i, name in enumerate(names):
        mine = sorted((way for way in ways if way.name == name), key=lambda way: way.setting or 0)
        at = [(60 + 500 * way.speed / most, 20 + 340 * way.loss / worst, way) for way in mine]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)
        out.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[i]}"/>')
        out += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if way.certified else 3}" fill="{COLOURS[i]}"><title>{name} '
            f"{'' if way.setting is None else way.setting}: loss {way.loss:.4f}, x{way.speed:.3f}</title></circle>"
            for x, y, way in at
        ]
        out.append(f'<text x="580" y="{30 + 18 * i}" fill="{COLOURS[i]}">{name}</text>')
    axes = '<path d="M60 20V360H560" fill="none" stroke="#000"/>'
    words = f'<text x="60" y="385">speed over plain speculation, to x{most:.2f}; downwards loss, to {worst:.3f}</text>'
    style = 'xmlns="http://www.w3.org/2000/svg" width="700" height="400" font-family="sans-serif" font-size="13"'
    return f"<svg {style}>{axes}{words}{''.join(out)}</svg>\n"


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
    parser.add_argument("--gamma", type=int, default=0, help="drafts at most; the artifact's where that is not 0")
    parser.add_argument("--each", type=int, default=5, help="alphas of each rule on the curve")
    parser.add_argument("--rules", default=",".join((*GRIDS, TOKEN, ANSWER)))
    parser.add_argument("--timed", type=int, default=4, help="prompts that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    generator = Generator.open(options.artifact)
    base = with_costs(generator.engine, options.gamma)
    rows = windows(generator, options.text.read_text(), options.prompt + options.tokens, options.prompts + options.test)
    asked = SpecCascade(tokens=options.tokens, loss=options.loss, risk=options.risk)
    heads, rest = [row[: options.prompt] for row in rows], [row[options.prompt :] for row in rows]
    parts = slice(options.prompts), slice(options.prompts, None)
    first, second = (Prompts(heads[part], rest[part] if options.risk else None, asked) for part in parts)
    run(Bench(base, first, second, rest[parts[1]], options.delta, options.epsilon, options.each), options)


def run(bench: Bench, options: argparse.Namespace) -> None:
    """Certify, judge, race, print."""
    ways: list[Way] = [*bench.models()]
    for name in options.rules.split(","):
        ways += bench.answers() if name == ANSWER else bench.rule(name)
    full = _tokens(bench.second.generate(ways[0].engine))
    for way in ways:
        bench.judge(way, full)
    race(ways, bench.second.rows[: options.timed], options.tokens, options.rounds)
    print(HEAD, *(way.row() for way in ways), sep="\n")
    print(chart(ways), verdict(ways, options.delta), sep="\n")
    if options.svg:
        options.svg.write_text(svg(ways))


def with_costs(engine: Engine, gamma: int) -> Engine:
    """Drafting, with the costs of this machine as it is now."""
    decode = {**engine.program.decode, "strategy": "speculative"}
    if not decode.get("drafter"):
        raise SystemExit(EffcError("bench: the artifact has no small model, want one of speccascade or cascade"))
    decode["gamma"] = gamma or decode.get("gamma") or 4
    for name in ("rule", "alpha", "delta", "level", "threshold", "confidence"):
        decode.pop(name, None)
    found = Engine(replace(engine.program, decode=decode), engine.params, engine.eos)
    costs = measure(found, decode["gamma"])
    print(
        f"T(1) {1e3 * costs.step:.2f} ms, a token of the small model {costs.draft:.3f} of it, gamma {decode['gamma']}"
    )
    decode |= {"curve": costs.curve, "cost": costs.draft}
    return Engine(replace(engine.program, decode=decode), engine.params, engine.eos)


if __name__ == "__main__":
    main()
