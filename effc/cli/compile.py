"""`effc compile`: would it run on a TPU, and how fast, without one."""

from __future__ import annotations

import argparse
from pathlib import Path

from effc.cli.arguments import json_option, positive, show, verb


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "compile",
        compile_,
        "compile for a TPU with the TPU compiler, on any machine, and estimate its speed",
        "effc compile out --target v5e:2x2",
    )
    parser.add_argument("model", type=Path, help="artifact, checkpoint or .effc file; no weights are read")
    parser.add_argument(
        "--target", default="v5e:2x2", help="a TPU topology; programs are for one of its chips (%(default)s)"
    )
    parser.add_argument("--batch", type=positive, default=1, help="sequences (%(default)s)")
    parser.add_argument("--context", type=positive, default=1024, help="tokens that the cache holds (%(default)s)")
    json_option(parser)


def compile_(args: argparse.Namespace) -> int:
    from effc.backend.tpu.ahead import compile_ahead
    from effc.opened import open_structure

    module = open_structure(args.model).module
    show(args, compile_ahead(module, args.target, batch=args.batch, context=args.context))
    return 0
