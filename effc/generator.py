"""Text in, text out: an engine with its tokenizer, of an artifact or of a checkpoint compiled on the fly."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from effc.artifact import WEIGHTS, is_artifact
from effc.backend.to_python import emit, load_program
from effc.frontend.tokenizer import Tokenizer
from effc.opened import Opened, open_model
from effc.runtime.engine import Engine
from effc.runtime.generate import Request, Result, Stats, stream
from effc.runtime.sampling import Sampling
from effc.runtime.weights import load_params
from effc.weights import write_safetensors


@dataclass(frozen=True)
class Asked:
    """What to generate, and how; temperature 0 takes the likeliest token."""

    max_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    seed: int = 0
    exits: float | None = None
    """Confidence at which tokens leave early, or a small model's answer is kept, 1 never; None: the certified one."""
    alpha: float | None = None
    """How much a cascade's rule keeps of the small model; -inf nothing; None: as certified or set by hand."""


@dataclass(frozen=True)
class Generator:
    """`Generator.open("out").text("import os")`."""

    engine: Engine
    tokenizer: Tokenizer

    @staticmethod
    def open(
        path: str | Path, *, module: str | None = None, dtype: str | None = None, cache: str | None = None
    ) -> Generator:
        """An artifact or a checkpoint; EffcError where it has no tokenizer. cache: as `Engine` has it."""
        opened = open_model(Path(path), module=module, dtype=dtype)
        tokenizer = opened.tokenizer()
        return Generator(engine_of(opened, tokenizer.eos_ids, cache), tokenizer)

    def text(self, prompt: str, **options: Any) -> str:
        """What follows the prompt; options are the fields of `Asked` and of `Sampling`."""
        return self.texts([prompt], **options)[0]

    def texts(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """What follows each prompt, generated together."""
        result = self.run([self.encode(prompt) for prompt in prompts], asked(**options))
        return result.texts or []

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """The same text in pieces, as they come."""
        return self.pieces(self.encode(prompt), asked(**options), Result([[]], ["length"], Stats()))

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """Token ids of a text, or of a chat's first message."""
        return self.tokenizer.ask(prompt) if chat else self.tokenizer.encode(prompt)

    def run(self, prompts: Sequence[Sequence[int]], how: Asked) -> Result:
        """All of it, for token ids."""
        result = Result([[] for _ in prompts], ["length"] * len(prompts), Stats())
        for _ in stream(self.engine, self._request(prompts, how), result):
            pass
        return result

    def pieces(self, prompt: Sequence[int], how: Asked, result: Result) -> Iterator[str]:
        """Text as it comes, none of a stop string in it; `result` is filled on the way."""
        writer, shown = self.tokenizer.stream(prompt), ""
        for news in stream(self.engine, self._request([prompt], how), result):
            piece = writer.extend(news[0])
            shown += piece
            yield piece
        yield _rest(shown + (flushed := writer.flush()), flushed, result)

    def _request(self, prompts: Sequence[Sequence[int]], how: Asked) -> Request:
        decode = self.tokenizer.decode
        return Request(
            prompts,
            how.max_tokens,
            how.sampling,
            seed=how.seed,
            stop=how.stop,
            decode=lambda ids: decode(ids),
            exits=how.exits,
            alpha=how.alpha,
        )


def asked(**options: Any) -> Asked:
    """From plain options: max_tokens, stop, seed, exits, and temperature, top_k ... as `Sampling` has them."""
    names = ("max_tokens", "stop", "seed", "exits", "alpha")
    own = {name: options.pop(name) for name in names if name in options}
    return replace(Asked(sampling=Sampling(**options)), **own)


def engine_of(opened: Opened, eos: tuple[int, ...] = (), cache: str | None = None) -> Engine:
    """The model with its weights mapped; a checkpoint's go through a file that is then deleted."""
    program = load_program(emit(opened.module))
    if is_artifact(opened.path):
        return Engine(program, load_params(opened.path / WEIGHTS, program.params), eos, cache)
    with tempfile.TemporaryDirectory(prefix="effc-") as folder:
        file = Path(folder) / WEIGHTS
        write_safetensors(file, opened.module, opened.store)
        return Engine(program, load_params(file, program.params), eos, cache)


def _rest(shown: str, flushed: str, result: Result) -> str:
    """What the stream held back; where a stop string cut a token in two, the part before the cut."""
    whole = result.texts[0] if result.texts else ""
    # A tokenizer may drop the first space of a text that is decoded without its prompt.
    cut = whole.lstrip().removeprefix(shown.lstrip()) if result.finish[0] == "stop" else ""
    return flushed + (cut if whole.lstrip().startswith(shown.lstrip()) else "")
