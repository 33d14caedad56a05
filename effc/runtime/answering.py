"""Cascades by whole answers: the small model answers, the large one where that was not confident.

An answer's confidence is made of the small model's own probabilities (temperature 1, no filters) of its tokens, read
again in one call. An empty answer has none. Where nothing is certified for what is asked, the large model answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.errors import EffcError, nearest
from effc.runtime.program import Program
from effc.runtime.sampling import Sampling

if TYPE_CHECKING:
    from effc.runtime.engine import Engine
    from effc.runtime.generate import Request, Result

LOWEST = 0.1
"""Share of an answer's tokens that may be less likely than `quantile` says."""

ROUND = 64
"""Answers are read padded to a multiple of this many tokens, so that few shapes are compiled."""

CONFIDENCES: Mapping[str, Callable[[np.ndarray], float]] = {
    "mean": lambda logs: float(np.exp(logs.mean())),
    "min": lambda logs: float(np.exp(logs.min())),
    "quantile": lambda logs: float(np.exp(np.quantile(logs, LOWEST))),
}
"""Of an answer, from the log-probabilities of its tokens: all are probabilities, 0 to 1. `mean` is the geometric."""


@dataclass(frozen=True)
class Answers:
    """What `decode cascade { level=sequence }` asks for. certified: tokens the threshold holds for, 0 if set by hand.

    asked: a threshold, whatever is certified.
    """

    entry: Callable[..., Any]
    confidence: str
    threshold: float
    certified: int = 0
    context: int | None = None
    asked: float | None = None

    def at(self, sampling: Sampling, new: int, asked: float | None = None) -> float:
        """The threshold for such texts: it is certified for greedy ones of so many tokens."""
        asked = self.asked if asked is None else asked
        if asked is not None:
            return asked
        plain = sampling.greedy and not sampling.filters
        return self.threshold if not self.certified or (plain and new <= self.certified) else 1.0

    def program(self, large: Program, params: Any) -> Program:
        """The small model alone, with logits of the large one's tokens."""
        vocab = jax.eval_shape(large.extend, params, jnp.zeros((1, 1), jnp.int32))[0].shape[-1]

        def extend(params: Any, tokens: jax.Array, cache: Any = None, valid: Any = None) -> Any:
            logits, cache = self.entry(params, tokens, cache, valid)
            logits, short = logits[..., :vocab], vocab - logits.shape[-1]
            return jnp.pad(logits, ((0, 0), (0, 0), (0, max(0, short))), constant_values=-jnp.inf), cache

        limits = [limit for limit in (large.context, self.context) if limit is not None]
        return Program(extend, large.params, min(limits, default=None))


def answers_of(program: Program) -> Answers | None:
    """What `DECODE` says; None where no small model answers."""
    asked = program.decode
    if asked.get("strategy") != "cascade" or asked.get("level") != "sequence":
        return None
    kind = str(asked.get("confidence", "mean"))
    if kind not in CONFIDENCES:
        raise EffcError(f"decode: no confidence '{kind}', want {' or '.join(CONFIDENCES)}{nearest(kind, CONFIDENCES)}")
    name, certified = str(asked.get("drafter")), int(asked.get("tokens", 0)) if "delta" in asked else 0
    if name not in program.entries:
        raise EffcError(f"decode: the program has no function '{name}'{nearest(name, program.entries)}")
    return Answers(program.entries[name], kind, float(asked.get("threshold", 1)), certified, asked.get("context"))


@dataclass(frozen=True)
class Answered:
    """What a cascade came to: confidence of each row's answer, whether it was deferred, forwards of either model."""

    confidences: tuple[float, ...]
    deferred: tuple[bool, ...]
    large_calls: int
    small_calls: int

    @property
    def deferral(self) -> float:
        """Share of answers that the large model gave."""
        return sum(self.deferred) / len(self.deferred)

    def json(self) -> dict[str, Any]:
        return {
            "confidences": list(self.confidences), "deferred": list(self.deferred), "deferral": self.deferral,
            "large_calls": self.large_calls, "small_calls": self.small_calls,
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{sum(self.deferred)} of {len(self.deferred)} answers deferred; "
            f"{self.large_calls} forwards of the large model, {self.small_calls} of the small one"
        )


def confidences(engine: Engine, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probabilities of each answer's tokens under the engine's model, own and unfiltered."""
    return [_read(engine, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _read(engine: Engine, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    if not answer:
        return np.zeros(0, np.float32)
    whole = [*prompt, *answer]
    size = -(-len(whole) // ROUND) * ROUND
    tokens = np.zeros(size if engine.context is None else min(size, engine.context), np.int32)
    tokens[: len(whole)] = whole
    logs = np.asarray(engine.spelled(jnp.asarray(tokens)[None]))[0]
    return logs[len(prompt) - 1 : len(whole) - 1]


def stream(engine: Engine, request: Request, result: Result, plain: Callable[..., Any]) -> Iterator[list[list[int]]]:
    """As `plain(engine, request, result)` of either model; the small one's answers come whole, all at once."""
    assert engine.answers is not None
    count = len(request.prompts)
    threshold = engine.answers.at(request.sampling, request.max_new_tokens, request.exits)
    if threshold >= 1:
        yield from plain(engine, request, result)
        result.stats.answers = Answered((), (True,) * count, sum(map(len, result.drawn)), 0)
        return
    first = _like(result, count)
    for _ in plain(engine.small, request, first):
        pass
    sure = _sure(engine, request, first)
    late = [row for row in range(count) if sure[row] < threshold]
    result.drawn = [[] for _ in range(count)]
    _placed(result, first, {row: row for row in range(count) if row not in late})
    yield [list(tokens) for tokens in result.tokens]
    second = _like(result, len(late))
    for news in plain(engine, _some(request, late), second) if late else ():
        yield [news[late.index(row)] if row in late else [] for row in range(count)]
    _placed(result, second, {row: at for at, row in enumerate(late)})
    _summed(result, first, second)
    # The small model reads its answer once more.
    calls = sum(map(len, second.drawn)), sum(map(len, first.drawn)) + count
    result.stats.answers = Answered(tuple(sure), tuple(row in late for row in range(count)), *calls)


def _like(result: Result, count: int) -> Result:
    """One for so many rows, empty."""
    stats = type(result.stats)()
    tokens, drawn = ([list[int]() for _ in range(count)] for _ in range(2))
    return replace(result, tokens=tokens, drawn=drawn, finish=["length"] * count, stats=stats, texts=None)


def _sure(engine: Engine, request: Request, first: Result) -> list[float]:
    """The confidence in each answer; reading them is time that decoding took."""
    assert engine.answers is not None
    measure, before = CONFIDENCES[engine.answers.confidence], engine.small.compile_seconds
    start = time.perf_counter()
    logs = confidences(engine.small, request.prompts, first.drawn)
    compiling = engine.small.compile_seconds - before
    first.stats.decode_seconds += time.perf_counter() - start - compiling
    first.stats.compile_seconds += compiling
    return [measure(row) if len(row) else 0.0 for row in logs]


def _some(request: Request, rows: Sequence[int]) -> Request:
    """The request of some rows; what they draw depends on where they stood."""
    seed = jax.random.key(request.seed)
    keys = jax.vmap(lambda row: jax.random.fold_in(seed, row))(jnp.arange(len(request.prompts)))
    keys = (keys if request.keys is None else request.keys)[jnp.asarray(rows)]
    return replace(request, prompts=[request.prompts[row] for row in rows], keys=keys)


def _placed(result: Result, other: Result, rows: Mapping[int, int]) -> None:
    """Row i of `result` is row rows[i] of the other one."""
    texts = list(result.texts or [""] * len(result.tokens))
    for row, at in rows.items():
        result.tokens[row], result.finish[row], result.drawn[row] = other.tokens[at], other.finish[at], other.drawn[at]
        texts[row] = other.texts[at] if other.texts else ""
    result.texts = texts if other.texts is not None else result.texts


def _summed(result: Result, *parts: Result) -> None:
    """Seconds of both models; tokens are those of the answers given, the first ones with the time they took."""
    stats = result.stats
    for name in ("prefill_seconds", "decode_seconds", "compile_seconds", "prompt_tokens"):
        setattr(stats, name, sum(getattr(part.stats, name) for part in parts))
    stats.new_tokens = sum(map(len, result.tokens))
    stats.decoded = max(0, stats.new_tokens - len(result.tokens))


__all__ = ["CONFIDENCES", "Answered", "Answers", "answers_of", "confidences", "stream"]
