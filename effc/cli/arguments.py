"""What all verbs share: mistakes in one line, options under one spelling, output as table or JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from effc.errors import EffcError, nearest

Run = Callable[[argparse.Namespace], int | None]


class Shown(Protocol):
    """What a verb prints."""

    def table(self) -> Any: ...

    def json(self) -> dict[str, Any]: ...


class Parser(argparse.ArgumentParser):
    """Mistakes are EffcError: one line and exit 1, as every other mistake."""

    def error(self, message: str) -> NoReturn:
        verb = self.prog.removeprefix("effc").strip()
        raise EffcError(f"{f'{verb}: ' if verb else ''}{message} (see {self.prog} --help)")


def verb(verbs: Any, name: str, run: Run, summary: str, *examples: str) -> Parser:
    """A new verb; its help ends in the examples."""
    lines = "\n".join(f"  {line}" for line in examples)
    parser: Parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example{'s' * (len(examples) > 1)}:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, examples=examples)
    return parser


def known_options(parser: Parser, words: Sequence[str]) -> None:
    """EffcError for an option that its verb does not have: argparse would first ask for what is missing."""
    own = _options(parser)
    for number, word in enumerate(words):
        if word == "--":
            return
        name = word.partition("=")[0]
        if name.startswith("--") and name not in own:
            raise EffcError(f"{words[0]}: no option '{name}'{nearest(name, own)} (see effc {words[0]} --help)")
        if number == 0 and not word.startswith("-"):
            own = _options(_verb_of(parser, word))


def _verb_of(parser: Parser, word: str) -> argparse.ArgumentParser:
    choices = _verbs(parser)
    if word not in choices:
        raise EffcError(f"no verb '{word}', want one of {', '.join(choices)}{nearest(word, choices)}")
    return choices[word]


def _verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0])


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return list(parser._option_string_actions)


def model_options(parser: argparse.ArgumentParser) -> None:
    """How to read a checkpoint that does not say all of it."""
    group = parser.add_argument_group("reading the checkpoint")
    group.add_argument(
        "--module",
        metavar="FILE.py:FUNC",
        action=_Module,
        help="function that builds the Flax module, for weights that name none; its code is run",
    )
    group.add_argument(
        "--inputs",
        metavar="ARG=ROLE,...",
        action=_Module,
        help="what arguments of the Flax module are given: tokens, positions, ones, zeros, causal (bool [b,t,t]), "
        "causal_heads (bool [b,1,t,t]), none, true or false",
    )
    group.add_argument("--dtype", help="compute in this dtype: float32 (default), bfloat16, float16")


def cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", choices=("f32", "f16", "i8", "i4"), help="keep keys and values so, where the model leaves it open: "
        "f16 by default beside quantized weights that native code runs, else f32, which is as computed",
    )  # fmt: skip


class _Module(argparse.Action):
    """`--module` and `--inputs` as one reference: FILE.py:FUNC(ARG=ROLE,...)."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        name, _, inputs = (getattr(namespace, "module", None) or "").partition("(")
        if option == "--module":
            name, _, given = values.partition("(")
            inputs = given or inputs
        else:
            inputs = f"{values})"
        namespace.module = f"{name}({inputs}" if inputs else name


def output_options(parser: argparse.ArgumentParser, *, default: str = "") -> None:
    """Where an artifact goes: has to be said where there is no `default`."""
    group, told = parser.add_argument_group("output"), f" (default: {default})" if default else ""
    group.add_argument(
        "-o", "--output", type=Path, required=not default, metavar="DIR", help=f"artifact to write{told}"
    )
    group.add_argument("--force", action="store_true", help="replace an artifact that is there")


def measuring_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What the report measures; the group, for more of the verb's own."""
    group = parser.add_argument_group("measuring")
    group.add_argument("--eval", type=Path, metavar="FILE", help="text to measure perplexity and KL on")
    group.add_argument("--no-speed", action="store_true", help="leave tokens/s out of the report")
    return group


def work_options(group: Any) -> None:
    """What lets training be repeated and resumed."""
    group.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    group.add_argument(
        "--work", type=Path, metavar="DIR", help="keep checkpoints of training here; the same command resumes"
    )


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def positive(text: str) -> int:
    """An int of 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}, want 1 or more")
    return value


def memory(text: str) -> int:
    """Bytes, for argparse: 3GB, 800MB, 2.5 GB, or a plain number."""
    found = re.fullmatch(r"(\d*\.?\d+)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no size, want the like of 3GB or 800MB")
    return int(float(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[found[2].upper()])


def show(args: argparse.Namespace, what: Shown) -> None:
    """As JSON where --json asks for it, else as a table on stdout."""
    if args.json:
        show_json(what.json())
    else:
        show_table(what.table())


def show_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def show_table(table: Any) -> None:
    """A rich renderable, as wide as the terminal; where there is none 110, no trailing spaces."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False).print(table)
        return
    console = Console(width=110, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def progress_console() -> Any:
    """Progress goes to stderr, so that stdout holds the result alone."""
    from rich.console import Console

    return Console(stderr=True)


def read_text(file: Path) -> str:
    """A UTF-8 file; EffcError if it is not."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise EffcError(f"{file}: not UTF-8 text") from None


def write_text(file: Path | None, text: str) -> None:
    """To the file, whole or not at all; to stdout where there is none."""
    if file is None:
        sys.stdout.write(text)
        return
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
