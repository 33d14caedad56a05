"""`effc inspect`, `opt`, `diff` and `passes`: looking at models and IR."""

from __future__ import annotations

import argparse
from pathlib import Path

from effc.cli.arguments import json_option, model_options, show, show_json, verb, write_text


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _add_inspect(verbs)
    _add_opt(verbs)
    _add_diff(verbs)
    _add_passes(verbs)


def _add_inspect(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "inspect",
        inspect,
        "show the structure of a model, what its parameters take, and what the compiler understood of it",
        "effc inspect examples/stdlib12/model.ckpt",
        "effc inspect out --ir > model.effc",
    )
    parser.add_argument("path", type=Path, help="checkpoint of any format, artifact, or .effc file")
    parser.add_argument("--ir", action="store_true", help="print the whole IR instead of the summary")
    model_options(parser)
    json_option(parser)


def inspect(args: argparse.Namespace) -> None:
    from effc.ir import dump
    from effc.opened import open_structure
    from effc.summary import summarize

    opened = open_structure(args.path, module=args.module, dtype=args.dtype)
    if not args.ir:
        show(args, summarize(opened.module, opened.notes))
    elif args.json:
        show_json({"ir": dump(opened.module)})
    else:
        write_text(None, dump(opened.module))


def _add_opt(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "opt",
        opt,
        "run passes on an IR file: structure only, no weights",
        "effc opt model.effc --passes quant4{group=64} -o smaller.effc",
        "effc opt model.effc --passes clean,fuse | diff model.effc -",
    )
    parser.add_argument("file", type=Path, help="a dump, perhaps edited by hand")
    parser.add_argument("--passes", default="", help="none: check the file and print it canonically")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write here instead of stdout")
    parser.add_argument("--print-ir-after-all", action="store_true", help="print the IR after every pass to stderr")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write the IR after every pass to DIR/NN-pass.effc")


def opt(args: argparse.Namespace) -> None:
    from effc.artifact import read_module
    from effc.driver import transform
    from effc.ir import dump

    module, _ = transform(read_module(args.file), args.passes, dump=args.dump, print_ir=args.print_ir_after_all)
    write_text(args.output, dump(module))


def _add_diff(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "diff",
        diff,
        "show what differs between two modules, op by op",
        "effc diff out-f32 out-q4",
        "effc diff dumps/00-input.effc dumps/01-quant4.effc",
    )
    parser.add_argument("first", type=Path, help=".effc file, artifact or checkpoint")
    parser.add_argument("second", type=Path, help="likewise")
    model_options(parser)
    json_option(parser)


def diff(args: argparse.Namespace) -> None:
    from effc.ir.diff import diff as compare
    from effc.opened import open_structure

    first, second = (open_structure(p, module=args.module, dtype=args.dtype) for p in (args.first, args.second))
    text = compare(first.module, second.module)
    if args.json:
        show_json({"same": not text, "diff": text.splitlines()})
    else:
        write_text(None, text or "no difference\n")


def _add_passes(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "passes",
        passes,
        "list the passes with their options, defaults and what they promise",
        "effc passes",
        "effc passes quant4",
    )
    parser.add_argument("name", nargs="?", help="only this one")
    json_option(parser)


def passes(args: argparse.Namespace) -> None:
    from effc.listing import listing

    show(args, listing(args.name))


__all__ = ["add"]
