"""Parsing: mistakes are one line and exit 1, every verb's help has examples that parse."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

import pytest

from effc.cli import main, make_parser
from effc.cli.arguments import memory

VERBS = [
    "optimize", "plan", "distill", "generate", "inspect", "opt", "diff", "passes", "eval", "bench", "bisect", "compile",
    "verify", "doctor",
]  # fmt: skip
NUMBERS = [verb for verb in VERBS if verb != "opt"]  # opt prints IR alone


def verbs() -> dict[str, argparse.ArgumentParser]:
    groups = make_parser()._subparsers
    assert groups is not None
    return dict(groups._group_actions[0].choices)  # type: ignore[arg-type]


def test_the_verbs_are_these() -> None:
    assert list(verbs()) == VERBS


def test_alone_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"    {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_examples_in_the_help_parse(verb: str) -> None:
    parser = verbs()[verb]
    examples = parser.get_default("examples")
    assert examples
    for line in examples:
        assert line in parser.format_help()
        words = shlex.split(line, comments=True)
        assert words[0] == "effc"
        end = next((i for i, word in enumerate(words) if word in "|>"), len(words))
        make_parser().parse_args(words[1:end])


@pytest.mark.parametrize("verb", NUMBERS)
def test_json_is_everywhere(verb: str) -> None:
    assert "--json" in verbs()[verb].format_help()


def test_every_option_has_help() -> None:
    for name, parser in verbs().items():
        for action in parser._actions:
            assert action.help or action.dest == "artifact", f"{name} {action.dest}"


MISTAKES = {
    "optimise m -o out": "no verb 'optimise', want one of optimize,",
    "optimize m --pases quant4 -o out": "optimize: no option '--pases'; did you mean '--passes'?",
    "generate --promt hi": "generate: no option '--promt'; did you mean '--prompt'?",
    "generate m --max-tokens 0 --prompt hi": "generate: argument --max-tokens: 0, want 1 or more",
    "generate m --seed x": "generate: argument --seed: invalid int value: 'x'",
    "generate m": "generate: no prompt, want --prompt TEXT (- for stdin) or --batch FILE",
    "optimize m": "m: no such file or folder",
    "optimize": "optimize: the following arguments are required: model",
    "verify a b": "unrecognized arguments: b",
    "passes quant5": "passes: no pass 'quant5', want one of ",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert MISTAKES[line] in err
    assert len(err.splitlines()) == 1


def test_as_a_process() -> None:
    """The installed entry point, without JAX: help must come at once."""
    code = "import sys; from effc.cli import main; status = main(['--help'])"
    check = "assert 'jax' not in sys.modules and 'rich' not in sys.modules"
    wrapped = f"try:\n {code}\nexcept SystemExit as end:\n {check}; sys.exit(end.code)"
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "optimize" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("effc 0.")


def test_sizes_of_memory() -> None:
    assert [memory(text) for text in ("3GB", "800MB", "2.5 gb", "4096", "1K")] == [
        3 * 10**9, 8 * 10**8, 25 * 10**8, 4096, 1000,
    ]  # fmt: skip
    for wrong in ("", "lots", "0", "-1GB", "3TB"):
        with pytest.raises(argparse.ArgumentTypeError, match="no size"):
            memory(wrong)
