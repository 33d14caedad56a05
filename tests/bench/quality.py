"""One table of what each way to code weights costs: bytes a parameter, perplexity and divergence on held-out text.

    python tests/bench/quality.py examples/stdlib12/model.ckpt --calib examples/stdlib12/calib.txt \
        --eval examples/stdlib12/heldout.txt --tokens 16384
    python tests/bench/quality.py SmolLM2-135M-Instruct.Q4_1.gguf --tokens 8192 quant4 'mixed{bits=5.43}'

Text of --calib is what methods are fitted to, --eval what they are judged on; without them, the end and the
beginning of Python's help topics. The standard error is that of the mean difference of a token's nats, estimated
from the divergence (their variance is about twice it).
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
    "quant4{group=128}",
    "quant4{group=128,method=awq}",
    "quant4{group=128,method=gptq}",
    "quant4{rules=@linear:3/32}",
    "quant4{rules=@linear:3/32,method=awq}",
    "quant4{rules=@linear:3/32,method=gptq}",
)


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pipelines", nargs="*", default=PIPELINES)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args(words)
    model = open_model(args.model)
    text = text_windows(model, args.eval, args.tokens, evaluate.WINDOW)
    print(f"{model.module.name}, {text.scored} tokens of {text.source}\n")
    print("| passes | bytes a parameter | perplexity | change | error | KL | same token | seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for passes in args.pipelines:
        print(row(model, passes, text, args.calib), flush=True)


def row(model: Opened, passes: str, text: evaluate.Windows, calib: Path | None) -> str:
    """A line of the table."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="effc-") as folder:
        after = coded(model, passes, text, calib, Path(folder))
        seconds = time.perf_counter() - start
        before, found = evaluate.compare((model.module, model.store), after.side, text)
    size = nbytes(after.module) / elements(after.module)
    assert found.kl is not None and found.top1 is not None
    error = (2 * found.kl / text.scored) ** 0.5
    change = found.perplexity / before.perplexity - 1
    numbers = f"{size:.3f} | {found.perplexity:.3f} | {change:+.2%} | {error:.2%} | {found.kl:.5f} | {found.top1:.2%}"
    return f"| `{passes}` | {numbers} | {seconds:.0f} |"


def coded(model: Opened, passes: str, text: evaluate.Windows, calib: Path | None, folder: Path) -> State:
    """The model after the passes."""
    start, words = State(model.module, model.store), evaluate.read_text(calib)[0] if calib else None
    context = Context("", model.module, model.store, model.tokenizer(), text, words, folder)
    clock = Clock(None)
    return run_passes(start, Pipeline.parse(passes), context, None, folder, lambda name, module: None, clock)[0]


if __name__ == "__main__":
    prepare()
    main(sys.argv[1:])
