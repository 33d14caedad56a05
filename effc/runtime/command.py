"""The command line of an emitted program."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effc.errors import EffcError
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.program import Program
from effc.runtime.sampling import Sampling
from effc.runtime.weights import load_params


def main(file: str, program: Program, argv: Sequence[str] | None = None) -> None:
    """Generate from the weights beside `file`; errors are one line and exit code 1."""
    options = _parser(file).parse_args(argv)
    try:
        _run(Path(file).parent, program, options)
    except EffcError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _parser(file: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=Path(file).name, description="Continue a prompt.")
    parser.add_argument("prompt", help="text, or token ids as 1,2,3 with --ids")
    parser.add_argument("--ids", action="store_true", help="the prompt is token ids; print token ids")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _run(folder: Path, program: Program, options: Any) -> None:
    encode, decode = (_ids, _spell) if options.ids else _tokenizer(folder)
    engine = Engine(program, load_params(folder / "model.safetensors", program.params), _eos(folder))
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    tokens: list[int] = []

    def show(_: int, new: list[int]) -> None:
        before = decode(tokens)
        tokens.extend(new)
        print(decode(tokens)[len(before) :], end="", flush=True)

    result = generate(
        engine, [encode(options.prompt)], max_new_tokens=options.max_new_tokens, sampling=sampling,
        seed=options.seed, on_tokens=show,
    )  # fmt: skip
    print(f"\n{result.stats.decode_rate:.1f} tokens/s", file=sys.stderr)


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise EffcError(f"prompt: '{text}' is not token ids, want numbers like 1,2,3") from None


def _spell(ids: Sequence[int]) -> str:
    return "".join(f"{token} " for token in ids)


def _tokenizer(folder: Path) -> tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]:
    path = folder / "tokenizer.json"
    try:
        import tokenizers
    except ImportError:
        raise EffcError("prompt: text needs the tokenizers package, want it installed or --ids") from None
    if not path.is_file():
        raise EffcError(f"{path}: no such file, want a tokenizer for a text prompt, or --ids")
    rust = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: rust.encode(text).ids, lambda ids: rust.decode(list(ids))


def _eos(folder: Path) -> tuple[int, ...]:
    """The ids that generation_config.json, if there is one, says end a text."""
    path = folder / "generation_config.json"
    found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
