"""The command line: verbs only. Each parses its arguments, calls the API and prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata

from effc.cli import bisect, check, compile, distill, generate, look, measure, optimize
from effc.cli.arguments import Parser, known_options
from effc.cli.process import prepare
from effc.errors import EffcError

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for what the user can mend (one line on stderr), 130 when interrupted."""
    if argv is None:
        prepare()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except EffcError as error:
        print(f"effc: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        sys.stdout = None  # type: ignore[assignment]  # or Python complains again while closing it
    except OSError as error:
        if error.filename is None:
            raise
        print(f"effc: {error.filename}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt as told:  # training says what it kept
        print(f"effc: interrupted; {str(told) or 'nothing half-written is left'}", file=sys.stderr)
        return INTERRUPTED
    return 1


def _run(words: list[str]) -> int:
    parser = make_parser()
    if not words:
        parser.print_help()
        return 0
    known_options(parser, words)
    args = parser.parse_args(words)
    return args.run(args) or 0


def make_parser() -> Parser:
    """The parser of all verbs, in the order of a first session."""
    parser = Parser(
        prog="effc",
        description="Compile a trained Flax language model into a cheaper one to serve.",
        epilog="`effc VERB --help` shows a verb's options and an example.",
        allow_abbrev=False,
    )
    version = f"effc {metadata.version('effc')}"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for group in (optimize, distill, generate, look, measure, bisect, compile, check):
        group.add(verbs)
    return parser


__all__ = ["main", "make_parser"]
