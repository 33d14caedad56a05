"""`effc eval` and `bench`: how good, how fast."""

from __future__ import annotations

import argparse
from pathlib import Path

from effc.cli.arguments import cache_option, json_option, model_options, positive, progress_console, show, verb


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _add_eval(verbs)
    _add_bench(verbs)


def _add_eval(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "eval",
        evaluate,
        "measure perplexity on a text, and the distance from another model",
        "effc eval out --text examples/stdlib12/heldout.txt --against examples/stdlib12/model.ckpt",
    )
    parser.add_argument("model", type=Path, help="artifact or checkpoint")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's help topics")
    parser.add_argument(
        "--against", type=Path, metavar="MODEL", help="also KL from this model and top-1 agreement with it"
    )
    parser.add_argument("--tokens", type=positive, default=4096, help="of the text, from its start (default 4096)")
    parser.add_argument("--window", type=positive, default=512, help="tokens scored together (default 512)")
    model_options(parser)
    json_option(parser)


def evaluate(args: argparse.Namespace) -> None:
    from effc.measure import evaluation
    from effc.opened import open_model

    model = open_model(args.model, module=args.module, dtype=args.dtype)
    other = open_model(args.against, module=args.module, dtype=args.dtype) if args.against else None
    show(
        args,
        evaluation(model, args.text, other, tokens=args.tokens, window=args.window, console=progress_console()),
    )


def _add_bench(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "bench",
        bench,
        "measure tokens a second, reading a prompt (pp) and generating (tg)",
        "effc bench out -p 512 -n 128 -r 5",
        "effc bench out --against out-f32 --json",
    )
    parser.add_argument("model", type=Path, help="artifact or checkpoint")
    parser.add_argument(
        "-p",
        "--prompt-tokens",
        type=positive,
        metavar="N",
        help="tokens of the prompt (512, or what the context holds)",
    )
    parser.add_argument("-n", "--new-tokens", type=positive, metavar="N", help="tokens to generate (128, likewise)")
    parser.add_argument("-r", "--runs", type=positive, default=5, help="timed runs after one to warm up (default 5)")
    parser.add_argument("-b", "--batch", type=positive, default=1, help="sequences at once (default 1)")
    parser.add_argument("--against", type=Path, metavar="MODEL", help="another model, run in turn with this one")
    cache_option(parser)
    model_options(parser)
    json_option(parser)


def bench(args: argparse.Namespace) -> None:
    from effc.measure import benchmark
    from effc.opened import open_model

    paths = [args.model, *([args.against] if args.against else [])]
    models = [open_model(path, module=args.module, dtype=args.dtype) for path in paths]
    sizes = {"prompt": args.prompt_tokens, "new": args.new_tokens, "runs": args.runs, "batch": args.batch}
    show(args, benchmark(models, **sizes, cache=args.cache, console=progress_console()))
