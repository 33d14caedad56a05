"""One table of what each way to code weights costs, and what is claimed of them, from one run.

    python tests/bench/quality.py examples/stdlib12/model.ckpt --calib examples/stdlib12/calib.txt \
        --eval examples/stdlib12/heldout.txt --tokens 0 --heal 20m
    python tests/bench/quality.py SmolLM2-135M-Instruct.Q4_1.gguf --eval - examples/stdlib12/heldout.txt --untrained
    python tests/bench/quality.py SmolLM2-135M-Instruct.Q4_1.gguf --window 512 2048 8192 --tokens 16384 -- kv8 kv4
    python tests/bench/quality.py MODEL --llama          # llama.cpp's figures for SmolLM2 beside ours

Text of --calib is what methods are fitted to; it is judged on --eval, of which there may be several (`-`: the
beginning of Python's help topics, whose end is what methods are fitted to without --calib). Errors are standard
errors over tokens; where two ways are compared, their tokens are paired. In pipelines `bits=SAME` is what quant4
takes, `bits=Q4_0` and `bits=Q4_K_M` what those formats of llama.cpp take (SIZES).
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from judging import Judge, Judged, share

from effc import evaluate
from effc.cli.process import prepare
from effc.clock import Clock
from effc.driver import transform
from effc.evaluate import Windows
from effc.ir.core import Module
from effc.ir.types import Quant
from effc.measure import text_windows
from effc.opened import Opened, open_model
from effc.passes.context import Context
from effc.pipeline import Pipeline
from effc.running import run_passes
from effc.runtime.train.budget import Budget
from effc.state import State
from effc.weights import elements, nbytes

UNIFORM, BUDGETED, TRAINED = "quant4{method=gptq}", "mixed{bits=SAME}", "qat{spend=SAME,method=gptq}"
SMALL, MIDDLE, EIGHT, SPREAD = "mixed{bits=Q4_0}", "mixed{bits=Q4_K_M}", "quant8{group=32,scale=f16}", "mixed{bits=8.1}"

SIZES = {"SAME": 0.0, "Q4_0": 0.68, "Q4_K_M": 0.78}
"""Bytes a parameter that words in pipelines stand for; 0 is what quant4 takes."""

PIPELINES = (
    "quant8", EIGHT, "quant8,act8", "quant8,act8{scale=static}", "quant8,kv8", "quant4{method=absmax}", "quant4",
    "quant4{method=awq}", UNIFORM, "quant4{method=awq+gptq}", "quant4{method=gptq},act8", "quant4{method=gptq},kv8",
    BUDGETED, SMALL, MIDDLE, SPREAD, TRAINED,
)  # fmt: skip

LIMITS = ((SMALL, 0.68, 0.06), (MIDDLE, 0.78, 0.03), (EIGHT, 1.07, 0.003), (SPREAD, 1.02, 0.003))
"""What is to cost no more than this share of perplexity, at no more than so many bytes a parameter."""

BETTER = (
    ("quant4{method=awq}", "quant4{method=absmax}"), (UNIFORM, "quant4{method=absmax}"),
    ("quant4{method=awq}", "quant4"), (UNIFORM, "quant4"), (BUDGETED, UNIFORM), (TRAINED, BUDGETED),
)  # fmt: skip
"""What is to be better than what: AWQ and GPTQ than rounding, mixed than uniform, training than fitting."""

LLAMA = (  # 80 kB of the Python reference, context 512, f32 11.34
    ("llama.cpp Q8_0", 1.063, 11.39 / 11.34 - 1),
    ("llama.cpp Q4_K_M", 0.78, 12.25 / 11.34 - 1),
    ("llama.cpp Q4_0", 0.68, 14.00 / 11.34 - 1),
)
"""Bytes a parameter, change of perplexity."""


@dataclass(frozen=True)
class Row:
    """One way to code: bytes a parameter, and how each text judges it."""

    passes: str
    size: float
    seconds: float
    judged: Sequence[Judged]

    def line(self) -> str:
        return f"| `{self.passes}` | {self.size:.3f} | {self.seconds:.0f} | {' | '.join(map(cells, self.judged))} |"


def cells(judged: Judged) -> str:
    return f"{judged.perplexity:.3f} | {judged.change().percent()} | {judged.kl().nats()} | {judged.same.mean():.2%}"


@dataclass(frozen=True)
class Bench:
    """A model, the texts that judge, the text that is fitted to, and the budget of what trains."""

    model: Opened
    texts: Sequence[Windows]
    judges: Sequence[Judge]
    calib: Path | None
    heal: Budget | None
    fit: Mapping[str, int]

    @staticmethod
    def of(
        model: Opened, texts: Sequence[Windows], calib: Path | None, heal: Budget | None, fit: Mapping[str, int],
        folder: Path,
    ) -> Bench:  # fmt: skip
        side, vocab = (model.module, model.store), evaluate.vocab_of(model.module)
        judges = [Judge(evaluate.pieces(side, text), text, vocab, folder / str(i)) for i, text in enumerate(texts)]
        return Bench(model, texts, judges, calib, heal, fit)

    def row(self, passes: str) -> Row:
        """Coded and judged."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="effc-") as folder:
            after = coded(self.model, passes, self.texts[0], self.calib, Path(folder), self.heal, self.fit)
            seconds = time.perf_counter() - start
            both = zip(self.judges, self.texts, strict=True)
            found = [judge.judged(evaluate.pieces(after.side, text)) for judge, text in both]
        return Row(passes, nbytes(after.module) / elements(after.module), seconds, found)


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pipelines", nargs="*", default=PIPELINES)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--eval", nargs="+", default=["-"], help="texts to judge on; - for help topics")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text; 0 for all")
    parser.add_argument("--window", type=int, nargs="+", default=[evaluate.WINDOW], help="tokens seen together")
    parser.add_argument("--heal", type=Budget.parse, help="of each pipeline that trains: 15m, or 300 for steps")
    parser.add_argument("--fit", type=int, default=16384, help="tokens that methods are fitted to")
    parser.add_argument("--probe", type=int, default=1024, help="tokens that mixed measures sensitivity on")
    parser.add_argument("--untrained", action="store_true", help="leave out what trains")
    parser.add_argument("--llama", action="store_true", help="llama.cpp's figures for SmolLM2")
    args = parser.parse_intermixed_args(words)
    model = open_model(args.model)
    files = [None if name == "-" else Path(name) for name in args.eval]
    texts = [text_windows(model, file, args.tokens, window) for file in files for window in args.window]
    fit = {"tokens": args.fit, "probe": args.probe}
    with tempfile.TemporaryDirectory(prefix="effc-") as folder:
        bench = Bench.of(model, texts, args.calib, args.heal, fit, Path(folder))
        _tables(bench, [p for p in args.pipelines if not (args.untrained and p.startswith("qat"))], args.llama)


def _tables(bench: Bench, pipelines: Sequence[str], llama: bool) -> None:
    told = [f"{t.scored} tokens of {t.source} in windows of {t.chunks[0].shape[1]}" for t in bench.texts]
    print(f"{bench.model.module.name}, {', '.join(told)}\n")
    each = " | ".join(["perplexity | change | KL | same token"] * len(told))
    print(f"| passes | bytes a parameter | seconds | {each} |")
    print("|---" * (3 + 4 * len(told)) + "|", flush=True)
    bits, rows = (
        {f"={n}": f"={bits_within(bench.model.module, size):.2f}" for n, size in SIZES.items()},
        dict[str, Row](),
    )
    for passes in pipelines:
        spelled = functools.reduce(lambda text, word: text.replace(word, bits[word]), bits, passes)
        rows[passes] = bench.row(spelled)
        print(rows[passes].line(), flush=True)
        if len(rows) == 1:
            print(f"| f32 | | | {' | '.join(_plain(judged) for judged in rows[passes].judged)} |", flush=True)
    for name, size, change in LLAMA if llama else ():
        print(f"| {name} | {size:.3f} | | | {change:+.2%} | | |")
    print("\n" + "\n".join(claims(rows)))


def _plain(judged: Judged) -> str:
    return f"{Judged(judged.before, judged.before, 0 * judged.apart, judged.same).perplexity:.3f} | | | "


def claims(rows: Mapping[str, Row]) -> list[str]:
    """A line for each claim whose rows there are, and whether it holds on each text."""
    out = ["| claim | " + " | ".join(["measured | holds"] * max((len(r.judged) for r in rows.values()), default=0))]
    for name, size, most in LIMITS:
        if name in rows:
            fits = rows[name].size <= size
            told = [f"{j.change().percent()} | {_holds(fits and j.change().value <= most)}" for j in rows[name].judged]
            asked = f"`{rows[name].passes}`: {rows[name].size:.3f} bytes of {size}, at most {most:+.1%}"
            out.append(" | ".join([f"| {asked}", *told]))
    for one, two in BETTER:
        if one in rows and two in rows:
            both = zip(rows[one].judged, rows[two].judged, strict=True)
            told = [f"{against(a, b)} | {_holds(a.apart.mean() < b.apart.mean())}" for a, b in both]
            out.append(" | ".join([f"| `{rows[one].passes}` better than `{rows[two].passes}`", *told]))
    return [f"{line} |" for line in out]


def against(one: Judged, two: Judged) -> str:
    """Perplexity and divergence of one less the other's."""
    apart = type(one.kl()).of(one.apart - two.apart)
    return f"perplexity {share(one.after - two.after).percent()}, KL {apart.value:+.5f} ± {apart.error:.5f}"


def _holds(true: bool) -> str:
    return "yes" if true else "no"


def bits_within(module: Module, size: float = 0.0) -> float:
    """Bits a weight for what quant4 codes, so that all takes `size` bytes a parameter (0: what quant4 takes), cut."""
    after, _ = transform(module, "quant4")
    params = [p for p in after.params.values() if isinstance(p.type.dtype, Quant)]
    only = Module(module.name, params={p.name: p for p in params})
    room = nbytes(only) - nbytes(after) + (size * elements(module) if size else nbytes(after))
    return int(800 * room / elements(only)) / 100


def coded(
    model: Opened, passes: str, text: Windows, calib: Path | None, folder: Path, heal: Budget | None = None,
    fit: Mapping[str, int] | None = None,
) -> State:  # fmt: skip
    """The model after the passes; `fit` are options that all passes get that have them."""
    start, words = State(model.module, model.store), evaluate.read_text(calib)[0] if calib else None
    context = Context("", model.module, model.store, model.tokenizer(), text, words, folder)
    asked, clock = Pipeline.parse(passes).passes, Clock(None)
    pipeline = Pipeline(tuple(replace(p, **{n: v for n, v in (fit or {}).items() if hasattr(p, n)}) for p in asked))
    state, reports = run_passes(start, pipeline, context, heal, folder, lambda name, module: None, clock)
    for line in (line for report in reports for line in (*report.choices, *report.healing())):
        print(f"  {passes}: {line}", file=sys.stderr)
    return state


if __name__ == "__main__":
    prepare()
    main(sys.argv[1:])
