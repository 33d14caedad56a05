"""`effc generate`: text from a model, as it comes."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effc.cli.arguments import cache_option, json_option, model_options, positive, read_text, show_json, verb
from effc.errors import EffcError

if TYPE_CHECKING:
    from effc.generator import Asked, Generator
    from effc.runtime.generate import Result


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verb(
        verbs,
        "generate",
        run,
        "continue a prompt; the text streams as it comes",
        'effc generate out --prompt "import os" --max-tokens 64 --stats',
        'effc generate out --chat --prompt "What is a compiler?" --temperature 0.7 --top-p 0.9 --seed 1',
        "effc generate out --batch prompts.txt --json",
    )
    parser.add_argument("model", type=Path, help="artifact, or a checkpoint, which is compiled on the fly")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="- reads it from stdin")
    what.add_argument("--batch", type=Path, metavar="FILE", help="a prompt a line, generated together")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-tokens", type=positive, default=128, metavar="N", help="at most (default 128)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    exits = parser.add_mutually_exclusive_group()
    exits.add_argument(
        "--full", action="store_true", help="all layers, or the large model alone, whatever is certified"
    )
    exits.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="leave, or keep a small model's answer or token, at confidence X: no guarantee",
    )
    exits.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help="of a cascade's rule: no guarantee (tokenv3 is lossless below 0, not at 0)",
    )
    parser.add_argument("--stats", action="store_true", help="tokens/s on stderr at the end, and what drafts came to")
    cache_option(parser)
    _sampling_options(parser)
    model_options(parser)
    json_option(parser)


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    group.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0 from all (default)")
    group.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that sum to p (default 1)")
    group.add_argument("--min-p", type=float, default=0.0, help="drop tokens under p times the likeliest (default 0)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="1 changes nothing (default)")
    group.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")


def prompts(args: argparse.Namespace) -> list[str]:
    """What to continue: --prompt, its stdin, or the lines of --batch."""
    if args.batch:
        lines = [line for line in read_text(args.batch).splitlines() if line]
        if not lines:
            raise EffcError(f"{args.batch}: no prompt in it, want one a line")
        return lines
    if args.prompt is None:
        raise EffcError("generate: no prompt, want --prompt TEXT (- for stdin) or --batch FILE")
    return [sys.stdin.read() if args.prompt == "-" else args.prompt]


def run(args: argparse.Namespace) -> None:
    texts = prompts(args)
    from effc.generator import Generator

    generator = Generator.open(args.model, module=args.module, dtype=args.dtype, cache=args.cache)
    ids = [generator.encode(text, args.chat) for text in texts]
    if args.batch or args.json:
        result = generator.run(ids, how(args))
    else:
        result = _stream(generator, ids[0], how(args))
    if args.json:
        show_json(data(texts, result))
    elif args.batch:
        print("\n\n".join(f"=== {prompt}\n{text}" for prompt, text in zip(texts, result.texts or [])))
    if args.stats:
        print(stats(result), file=sys.stderr)


def how(args: argparse.Namespace) -> Asked:
    """The options as the API takes them."""
    from effc.generator import asked

    names = ("max_tokens", "stop", "seed", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    exits, alpha = (1.0, -math.inf) if args.full else (args.threshold, args.alpha)
    return asked(**{name: getattr(args, name) for name in names}, exits=exits, alpha=alpha)


def _stream(generator: Generator, prompt: list[int], how: Asked) -> Result:
    from effc.runtime.generate import Result, Stats

    result = Result([[]], ["length"], Stats())
    for piece in generator.pieces(prompt, how, result):
        print(piece, end="", flush=True)
    print()
    return result


def data(texts: list[str], result: Result) -> dict[str, Any]:
    """For --json."""
    rows = zip(texts, result.texts or [], result.tokens, result.finish)
    outputs = [{"prompt": p, "text": t, "tokens": ids, "finish": why} for p, t, ids, why in rows]
    rates = {
        "prefill_tokens_per_second": result.stats.prefill_rate,
        "tokens_per_second": result.stats.decode_rate,
    }
    draft = result.stats.draft.json() if result.stats.draft else None
    answers = result.stats.answers.json() if result.stats.answers else None
    return {"outputs": outputs, "stats": asdict(result.stats) | rates | {"draft": draft, "answers": answers}}


def stats(result: Result) -> str:
    """A line, and one more of drafts or answers."""
    s = result.stats
    left = f"; {s.exits.average:.2f} layers a token, by layers {dict(s.exits.by_layers)}" if s.exits else ""
    left += f"; all layers ran: {s.full}" if s.full else ""
    return (
        f"prompt {s.prompt_tokens} tokens, {s.prefill_rate:.1f} tokens/s; "
        f"new {s.new_tokens} tokens, {s.decode_rate:.1f} tokens/s; compiled in {s.compile_seconds:.1f} s{left}"
        + "".join(f"\n{told}" for told in (s.draft, s.answers) if told)
    )
