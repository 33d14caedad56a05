"""`effc bisect`: which layer hurts."""

from __future__ import annotations

import argparse
from pathlib import Path

from effc.cli.arguments import json_option, model_options, positive, progress_console, show, verb


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "bisect",
        run,
        "name the layer that hurts: divergence where only one layer is the artifact's, layer by layer",
        "effc bisect out --against examples/stdlib12/model.ckpt --text examples/stdlib12/heldout.txt",
    )
    parser.add_argument("model", type=Path, help="artifact of a quantizer")
    parser.add_argument("--against", type=Path, metavar="MODEL", required=True, help="the model it was made of")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's help topics")
    parser.add_argument("--tokens", type=positive, default=1024, help="of the text, from its start (default 1024)")
    parser.add_argument("--window", type=positive, default=512, help="tokens scored together (default 512)")
    model_options(parser)
    json_option(parser)


def run(args: argparse.Namespace) -> None:
    from effc.bisect import bisect
    from effc.measure import text_windows
    from effc.opened import open_model

    model = open_model(args.model, module=args.module, dtype=args.dtype)
    other = open_model(args.against, module=args.module, dtype=args.dtype)
    text = text_windows(other, args.text, args.tokens, args.window)
    show(args, bisect(model, other, text, progress_console()))
