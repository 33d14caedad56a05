"""One table of what each way to code weights costs: bytes a parameter, perplexity and divergence on held-out texts.

    python tests/bench/quality.py examples/stdlib12/model.ckpt --calib examples/stdlib12/calib.txt \
        --eval examples/stdlib12/heldout.txt --tokens 8192 --heal 15m
    python tests/bench/quality.py SmolLM2-135M-Instruct.Q4_1.gguf --tokens 4096 \
        --eval examples/stdlib12/heldout.txt quant4 'mixed{bits=5.43}'
    python tests/bench/quality.py MODEL --llama          # llama.cpp's figures for SmolLM2 beside ours, and the targets

Text of --calib is what methods are fitted to; it is judged on --eval, of which there may be several (`-`: the
beginning of Python's help topics, whose end is what methods are fitted to without --calib). The standard error is
that of the mean difference of a token's nats, estimated from the divergence (their variance is about twice it).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from effc import evaluate
from effc.cli.process import prepare
from effc.clock import Clock
from effc.measure import text_windows
from effc.opened import Opened, open_model
from effc.passes.context import Context
from effc.pipeline import Pipeline
from effc.running import run_passes
from effc.runtime.train.budget import Budget
from effc.state import State
from effc.weights import elements, nbytes

PIPELINES = (
    "quant8",
    "quant4{method=absmax}",
    "quant4",
    "quant4{method=awq}",
    "quant4{method=gptq}",
    "quant4{method=awq+gptq}",
    "mixed{bits=4.97}",
    "qat",
)

LLAMA = (  # 80 kB of the Python reference, context 512, f32 11.34
    ("llama.cpp Q8_0", 1.063, 11.39 / 11.34 - 1, 0.003),
    ("llama.cpp Q4_K_M", 0.78, 12.25 / 11.34 - 1, 0.03),
    ("llama.cpp Q4_0", 0.68, 14.00 / 11.34 - 1, 0.06),
)
"""Bytes a parameter, change of perplexity, and what is to be reached at no more bytes."""


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pipelines", nargs="*", default=PIPELINES)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--eval", action="append", help="text to judge on, may be given again; - for help topics")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heal", type=Budget.parse, help="of each pipeline that trains: 15m, or 300 for steps")
    parser.add_argument("--llama", action="store_true", help="llama.cpp's figures for SmolLM2, and the targets")
    args = parser.parse_intermixed_args(words)
    model = open_model(args.model)
    files = [None if name == "-" else Path(name) for name in args.eval or ["-"]]
    texts = [text_windows(model, file, args.tokens, evaluate.WINDOW) for file in files]
    print(f"{model.module.name}, {', '.join(f'{text.scored} tokens of {text.source}' for text in texts)}\n")
    each = " | ".join(["perplexity | change | error | KL | same token"] * len(texts))
    print(f"| passes | bytes a parameter | seconds | {each} |")
    print("|---" * (3 + 5 * len(texts)) + "|", flush=True)
    for passes in args.pipelines:
        print(row(model, passes, texts, args.calib, args.heal), flush=True)
    for name, size, change, target in LLAMA if args.llama else ():
        print(f"| {name} | {size:.3f} | | | {change:+.2%}, target {target:+.1%} | | | |")


def row(
    model: Opened, passes: str, texts: Sequence[evaluate.Windows], calib: Path | None, heal: Budget | None = None
) -> str:
    """A line of the table."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="effc-") as folder:
        after = coded(model, passes, texts[0], calib, Path(folder), heal)
        seconds = time.perf_counter() - start
        cells = [_judged(model, after, text) for text in texts]
    size = nbytes(after.module) / elements(after.module)
    return f"| `{passes}` | {size:.3f} | {seconds:.0f} | {' | '.join(cells)} |"


def _judged(model: Opened, after: State, text: evaluate.Windows) -> str:
    """Cells of one text."""
    before, found = evaluate.compare((model.module, model.store), after.side, text)
    assert found.kl is not None and found.top1 is not None
    error = (2 * found.kl / text.scored) ** 0.5
    change = found.perplexity / before.perplexity - 1
    return f"{found.perplexity:.3f} | {change:+.2%} | {error:.2%} | {found.kl:.5f} | {found.top1:.2%}"


def coded(
    model: Opened, passes: str, text: evaluate.Windows, calib: Path | None, folder: Path, heal: Budget | None = None
) -> State:
    """The model after the passes."""
    start, words = State(model.module, model.store), evaluate.read_text(calib)[0] if calib else None
    context = Context("", model.module, model.store, model.tokenizer(), text, words, folder)
    pipeline, clock = Pipeline.parse(passes), Clock(None)
    state, reports = run_passes(start, pipeline, context, heal, folder, lambda name, module: None, clock)
    for line in (line for report in reports for line in (*report.choices, *report.healing())):
        print(f"  {passes}: {line}", file=sys.stderr)
    return state


if __name__ == "__main__":
    prepare()
    main(sys.argv[1:])
