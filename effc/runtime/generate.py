"""Text from prompts: prefill in pieces, then chunks of decoding; a batch may be ragged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.errors import EffcError
from effc.runtime import answering, deferral
from effc.runtime.answering import Answered
from effc.runtime.cache import Cache
from effc.runtime.drafting import Tally, Widths
from effc.runtime.engine import DONE, Engine, How, State, check_length, pieces
from effc.runtime.gain import Table
from effc.runtime.leaving import Left, told
from effc.runtime.sampling import Sampling
from effc.runtime.text import Decoder, Watch

OnTokens = Callable[[int, list[int]], None]
"""Called with a row and its new tokens as they come."""


@dataclass(frozen=True)
class Drafted:
    """What drafts came to. A call is one of the target for one row; each emits the drafts accepted and one more."""

    calls: int
    drafted: int
    accepted: int
    emitted: int
    drafted_at: tuple[int, ...]  # by position in the draft
    accepted_at: tuple[int, ...]
    rounds: dict[int, int]  # by width, the drafts that the call verified; 0 is a plain step
    draft_seconds: float  # the decoding time shared out by what drafts and calls cost when they were measured
    verify_seconds: float
    draft_calls: int = 0  # forwards of what drafts, a row each; 0 for drafts that are copied
    deferral: float | None = None  # in a cascade the share of tokens that its rule left to the target

    @property
    def tokens_per_call(self) -> float:
        """The token after the drafts counted."""
        return self.emitted / self.calls if self.calls else 0.0

    @property
    def acceptance(self) -> float:
        """Share of drafts accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def by_position(self) -> tuple[float, ...]:
        """Share accepted of those drafted, for the first, second ... of a draft."""
        return tuple(a / d if d else 0.0 for a, d in zip(self.accepted_at, self.drafted_at, strict=True))

    def json(self) -> dict[str, Any]:
        """Counts, and the shares made of them."""
        shares = {
            "acceptance": self.acceptance,
            "tokens_per_call": self.tokens_per_call,
            "acceptance_by_position": list(self.by_position),
            "rounds": {str(width): count for width, count in self.rounds.items()},
        }
        return asdict(self) | shares

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.2f}" for share, n in zip(self.by_position, self.drafted_at) if n)
        return (
            f"drafted {self.drafted}, accepted {self.accepted}"
            + (f" (by position {shares})" if shares else "")
            + f"; {self.tokens_per_call:.2f} tokens a target call; "
            f"drafting {self.draft_seconds:.2f} s, verifying {self.verify_seconds:.2f} s"
            + ("" if self.deferral is None else f"; {self.deferral:.1%} deferred, {self._forwards()}")
        )

    def _forwards(self) -> str:
        return f"{self.calls} forwards of the large model, {self.draft_calls} of the small one"


def counted(tally: Tally, widths: Widths, seconds: float, cascade: bool = False) -> Drafted:
    """The counts of a loop as numbers; seconds it took in all."""
    drafted, accepted = (tuple(map(int, np.asarray(x))) for x in (tally.drafted, tally.accepted))
    rounds = dict(zip(widths.sizes, map(int, np.asarray(tally.rounds)), strict=True))
    verify, draft = sum(widths.costs[n] * count for n, count in rounds.items()), widths.draft * int(tally.made)
    each = seconds / ((verify + draft) or 1)
    counts = int(tally.calls), sum(drafted), sum(accepted), int(tally.emitted)
    deferral = float(tally.deferred) / max(1, int(tally.emitted)) if cascade else None
    made = int(tally.made) if widths.draft or cascade else 0
    return Drafted(*counts, drafted, accepted, rounds, draft * each, verify * each, made, deferral)


def _shares(table: Table) -> tuple[float, ...]:
    """Of all rows together, what is known of each level; the prior counts as one observation of each row."""
    right, tried = (np.asarray(x).sum(axis=0) for x in (table.right, table.tried))
    return tuple(round(float(share), 3) for share in right / tried)


@dataclass
class Stats:
    """Counts and seconds; compiling is counted apart from the work."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    decoded: int = 0  # tokens that decode_seconds covers: the first of each row comes from prefill
    draft: Drafted | None = None  # where the program has a drafter
    exits: Left | None = None  # where tokens left early
    full: str = ""  # why all layers ran, of a program with exits
    levels: tuple[float, ...] | None = None  # how often drafts of each level were right
    answers: Answered | None = None  # where a small model answered first

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second, all rows together."""
        return self.decoded / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Result:
    """tokens and finish (`stop`, `length`) of each row; texts too where a decoder was given.

    Tokens that stop a text are not part of it, nor is any of a stop string. drawn: of each row all tokens as they
    were chosen, those that spell a stop string and what was chosen before it was noticed too.
    """

    tokens: list[list[int]]
    finish: list[str]
    stats: Stats
    texts: list[str] | None = None
    drawn: list[list[int]] = field(default_factory=list[list[int]])


CHUNK, LARGE_CHUNK = 32, 128
"""Tokens made between two looks at them. Starting the program anew takes as long as one or two steps."""


@dataclass
class Request:
    """What to generate. stop strings need `decode`, ids -> text."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Sequence[int] | None = None  # None: the engine's own
    seed: int = 0
    chunk: int = CHUNK
    stop: Sequence[str] = ()
    decode: Decoder | None = None
    exits: float | None = None  # threshold of early exits or a plain cascade, 1 never; None: the certified one
    alpha: float | None = None  # of a cascade's rule, -inf defers always; None: as certified or set by hand
    keys: jax.Array | None = None  # one a row, instead of `seed`: what a row draws then depends on its own alone


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    sampling: Sampling | None = None, stop_ids: Sequence[int] | None = None, seed: int = 0, chunk: int = 0,
    stop: Sequence[str] = (), decode: Decoder | None = None, exits: float | None = None,
    on_tokens: OnTokens | None = None, alpha: float | None = None,
) -> Result:  # fmt: skip
    """Up to max_new_tokens after each prompt; a row's tokens do not depend on the other rows.

    chunk: tokens made between two looks at them; 0 is many where nobody reads along and no stop string may end them.
    """
    how, chunk = sampling or Sampling(), chunk or (CHUNK if stop or on_tokens else LARGE_CHUNK)
    request = Request(prompts, max_new_tokens, how, stop_ids, seed, chunk, stop, decode, exits, alpha)
    result = Result([[] for _ in prompts], ["length"] * len(prompts), Stats())
    for news in stream(engine, request, result):
        for row, tokens in enumerate(news):
            if on_tokens and tokens:
                on_tokens(row, tokens)
    return result


def stream(engine: Engine, request: Request, result: Result) -> Iterator[list[list[int]]]:
    """The new tokens of each row, a chunk at a time; `result` is filled on the way.

    Tokens that may begin a stop string are held back until that is decided.
    """
    if engine.answers is not None:
        yield from answering.stream(engine, request, result, _stream)
    else:
        yield from _stream(engine, request, result)


def _stream(engine: Engine, request: Request, result: Result) -> Iterator[list[list[int]]]:
    """By this engine's model alone."""
    run = _Run(engine, request, result)
    yield run.take(run.prefill())
    while not run.finished():
        yield run.take(run.decode())
    run.account()
    result.texts = [watch.text for watch in run.watches] if request.decode else None


class _Run:
    """One request under way."""

    def __init__(self, engine: Engine, request: Request, result: Result):
        self.engine, self.request, self.result = engine, request, result
        self.lengths = [len(prompt) for prompt in request.prompts]
        self._check()
        stops = engine.eos if request.stop_ids is None else request.stop_ids
        sampling = request.sampling
        ends = jnp.asarray(list(stops) or [DONE], jnp.int32)
        self.how = How(sampling, sampling.numbers(), ends, request.exits, request.alpha)
        self.seed = jax.random.key(request.seed) if request.keys is None else request.keys
        self.done, self.sent = [False] * len(self.lengths), [0] * len(self.lengths)
        self.left = np.full(len(self.lengths), request.max_new_tokens)
        self.watches = [Watch(request.decode, request.stop) for _ in self.lengths]
        result.drawn = [[] for _ in self.lengths]
        self.state: State = {}

    def _check(self) -> None:
        if not self.lengths:
            raise EffcError("generate: no prompts, want at least one")
        check_length(min(self.lengths), self.request.max_new_tokens, None)
        check_length(max(self.lengths), self.request.max_new_tokens, self.engine.context)
        if self.request.keys is not None and self.request.keys.shape != (len(self.lengths),):
            raise EffcError(
                f"generate: keys {list(self.request.keys.shape)}, want one for each of {len(self.lengths)} prompts"
            )
        speculation, alpha = self.engine.speculation, self.request.alpha
        if alpha is not None and alpha > deferral.LOSSLESS and not (speculation and speculation.rule):
            raise EffcError(f"generate: alpha is {alpha:g}, but no deferral rule runs here, want none")
        if self.request.stop and self.request.decode is None:
            raise EffcError("generate: stop strings are given without a decoder, want `decode` (ids -> text)")

    def prefill(self) -> np.ndarray:
        """The first new token of each row, i32[b,1]."""
        timer = _Timer(self.engine, self.result.stats)
        logits, features, cache = self._read_prompts()
        vocab, new = logits.shape[-1], self.request.max_new_tokens
        self.state = self.engine.choose(logits, self._first_state(cache, vocab), self.how)
        self.state = self.engine.begin(self.state, self.how, self.request.prompts, new, vocab, features)
        first = np.where(np.asarray(self.state["done"]), DONE, np.asarray(self.state["token"]))[:, None]
        self.result.stats.prompt_tokens = sum(self.lengths)
        self.result.stats.prefill_seconds += timer.seconds()
        return first

    def _read_prompts(self) -> tuple[jax.Array, jax.Array | None, Cache]:
        """Logits [b,1,V] after the last token of each prompt, features of all, and the cache that holds them."""
        lengths = np.asarray(self.lengths, np.int32)
        cuts = pieces(max(self.lengths), self.engine.context)
        end = sum(cuts[-1])
        tokens = _padded(self.request.prompts, end)
        room = max(end, max(self.lengths) + self.request.max_new_tokens + self.engine.spare)
        cache, last, features = self.engine.empty(len(lengths), room), None, list[jax.Array]()
        for start, size in cuts:
            valid = np.clip(lengths - start, 0, size)
            piece = jnp.asarray(tokens[:, start : start + size])
            logits, found, cache = self.engine.read(piece, cache, jnp.asarray(valid))
            features += [] if found is None else [found]
            last = logits if last is None else jnp.where((valid > 0)[:, None, None], logits, last)
        assert last is not None
        return last, jnp.concatenate(features, axis=1) if features else None, cache

    def _first_state(self, cache: Cache, vocab: int) -> State:
        rows = len(self.lengths)
        return {
            "cache": cache, "token": jnp.zeros(rows, jnp.int32), "done": jnp.zeros(rows, bool),
            "row": jnp.arange(rows, dtype=jnp.int32) * (self.request.keys is None), "seed": self.seed,
            "seen": _seen(self.request.prompts, vocab) if "repetition_penalty" in self.how.filters else None,
        }  # fmt: skip

    def decode(self) -> np.ndarray:
        """i32[b,n]: up to a chunk more tokens of each row."""
        count = min(int(self.left[~np.asarray(self.done)].max()), self.request.chunk)
        timer = _Timer(self.engine, self.result.stats)
        self.state["done"] = jnp.asarray(np.asarray(self.state["done"]) | self.done)
        self.state, out = self.engine.decode(self.state, self.how, count, self.request.chunk)
        tokens = np.asarray(out)
        self.result.stats.decode_seconds += timer.seconds()
        self.result.stats.decoded += int((tokens != DONE).sum())
        return tokens

    def take(self, tokens: np.ndarray) -> list[list[int]]:
        """What of tokens[b,n], and of those held back, belongs to each text; notes which rows have ended."""
        ended = np.asarray(self.state["done"])
        self.left -= (tokens != DONE).sum(axis=1)
        news = [self._take_row(row, tokens[row], bool(ended[row])) for row in range(len(self.lengths))]
        self.result.stats.new_tokens = sum(map(len, self.result.tokens))
        return news

    def _take_row(self, row: int, tokens: np.ndarray, ended: bool) -> list[int]:
        if self.done[row]:
            return []
        final = self.left[row] == 0
        kept, watch = self.result.tokens[row], self.watches[row]
        news = [int(token) for token in tokens if token != DONE]
        kept.extend(news)
        self.result.drawn[row] += news
        cut = watch.see(kept)
        if cut is not None:
            del kept[cut:]
        if ended or cut is not None:
            self.done[row], self.result.finish[row] = True, "stop"
        start, stop = self.sent[row], len(kept) if final or self.done[row] else watch.safe(len(kept))
        self.sent[row] = max(start, stop)
        return kept[start:stop]

    def finished(self) -> bool:
        """Whether no row goes on."""
        return all(done or left == 0 for done, left in zip(self.done, self.left, strict=True))

    def position(self) -> tuple[list[int], list[bool]]:
        """Tokens that each row may still have, and which rows have ended."""
        return self.left.tolist(), list(self.done)

    def account(self) -> None:
        """What drafts and exits came to, for the stats."""
        self.result.stats.exits = told(self.state)
        if self.engine.exits:
            self.result.stats.full = self.engine.exits.idle(len(self.lengths), self.how.exits, self.how.plain)
        tally = self.state.get("tally")
        if tally is not None and self.engine.speculation:
            widths = self.engine.speculation.widths.at(len(self.lengths))
            cascade, seconds = bool(self.engine.speculation.rule), self.result.stats.decode_seconds
            self.result.stats.draft = counted(tally, widths, seconds, cascade)
            self.result.stats.levels = _shares(self.state["table"])


class _Timer:
    """Seconds since it was made, less what was spent compiling (which goes to the stats)."""

    def __init__(self, engine: Engine, stats: Stats):
        self.engine, self.stats = engine, stats
        self.start, self.before = time.perf_counter(), engine.compile_seconds

    def seconds(self) -> float:
        compiling = self.engine.compile_seconds - self.before
        self.stats.compile_seconds += compiling
        return time.perf_counter() - self.start - compiling


def _padded(prompts: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """i32[b,width], zeros on the right."""
    out = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        out[row, : len(prompt)] = prompt
    return out


def _seen(prompts: Sequence[Sequence[int]], vocab: int) -> jax.Array:
    """bool[b,V]: tokens of each prompt."""
    seen = np.zeros((len(prompts), vocab), bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return jnp.asarray(seen)
