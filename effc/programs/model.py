"""Calls answered by an engine, many in one device call.

An answer must not depend on what else was asked, to the bit. So the shapes of a device call are those of the call
alone: rows are fixed (a short batch is filled up), and only calls whose padded prompt, cache and settings have the same
shapes share a batch. A row's draws have a key of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.certificate import fingerprint
from effc.generator import Generator
from effc.opened import Opened
from effc.programs.calls import Answer, Cache, Call, Drawing, Drawn, Model, Scored, Scoring, Usage
from effc.programs.keys import stacked
from effc.programs.spelling import cut, found, spelled
from effc.runtime.engine import ROUND, check_length, pieces
from effc.runtime.generate import Request, Result, Stats, stream
from effc.runtime.sampling import Numbers, Sampling, filtered

ROWS = 8
"""Rows of a device call, unless asked otherwise."""

_CHUNK = 16
"""Tokens between looks for a stop string."""

_SIZES = (8, 32, 128)
"""Ids are scored so many at a time, padded on the right: their logits [rows,t,V] are in memory."""

_numbers = itertools.count()


class EngineModel(Model):
    """A generator's engine and tokenizer; without `opened` weights have no hash: no other model shares its answers."""

    def __init__(self, generator: Generator, opened: Opened | None, rows: int | None, cache: Cache | None):
        self.engine, self.tokenizer, self._opened = generator.engine, generator.tokenizer, opened
        # Rounds of drafting are shared by the rows of a batch; alone, a row depends on itself only.
        self.rows = rows or (1 if self.engine.speculation else ROWS)
        self.cache, self.usage = cache if cache is not None else Cache(), Usage()
        self.speller = self.tokenizer.files.json

    @cached_property
    def digest(self) -> Hashable:
        """Of program, weights and the cache's type: what decides an answer beside the call."""
        if self._opened is None:
            return next(_numbers)
        return fingerprint(self._opened.module, self._opened.store), self.engine.cache, self.rows

    def encode(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer.encode(text)
        check_length(len(ids), 1, None, "prompt")
        return tuple(ids)

    def spell(self, prompt: str, ids: Sequence[int], value: str) -> tuple[int, ...]:
        return spelled(self.tokenizer, prompt, ids, value, "log_prob")

    def check(self, prompt: Sequence[int], new: int) -> None:
        check_length(len(prompt), new, self.engine.context, "prompt")

    def answer(self, calls: Sequence[Call]) -> list[Answer]:
        kept = {call: self.cache.get(_key(self.digest, call)) for call in dict.fromkeys(calls)}
        asked = [call for call, answer in kept.items() if answer is None]
        self.usage.hits += len(calls) - len(asked)
        for call, answer in self._run(asked):
            kept[call] = answer
            self.cache.put(_key(self.digest, call), answer)
        return [answer for answer in map(kept.__getitem__, calls) if answer is not None]

    def _run(self, calls: Sequence[Call]) -> list[tuple[Call, Answer]]:
        groups: dict[Hashable, list[Call]] = {}
        for call in calls:
            groups.setdefault(self._shape(call), []).append(call)
        out: list[tuple[Call, Answer]] = []
        for group in groups.values():
            for start in range(0, len(group), self.rows):
                batch = group[start : start + self.rows]
                out += zip(batch, self._answer(batch), strict=True)
        return out

    def _shape(self, call: Call) -> Hashable:
        """Equal for calls that may share a batch."""
        if isinstance(call, Drawing):
            return call.how, self._room(call)
        return call.sampling, tuple(self._cuts(call)), tuple(self._value_cuts(call))

    def _answer(self, batch: Sequence[Call]) -> Sequence[Answer]:
        self.usage.calls += 1
        self.usage.rows += len(batch)
        self.usage.padded += self.rows - len(batch)
        draws = [call for call in batch if isinstance(call, Drawing)]
        return self._draw(draws) if draws else self._scored([call for call in batch if isinstance(call, Scoring)])

    # ---- drawing

    def _room(self, call: Drawing) -> tuple[int, int]:
        """Padded prompt, and the cache it makes `generate` take."""
        end = sum(pieces(len(call.prompt), self.engine.context)[-1])
        room = max(end, len(call.prompt) + call.how.max_tokens + self.engine.spare)
        return end, -(-room // ROUND)

    def _draw(self, batch: Sequence[Drawing]) -> list[Drawn]:
        how, rows = batch[0].how, _filled(batch, self.rows)
        request = Request(
            [call.prompt for call in rows], how.max_tokens, how.sampling, chunk=_CHUNK, stop=how.stop,
            decode=self.tokenizer.decode if how.stop else None, keys=stacked([call.key for call in rows]),
        )  # fmt: skip
        result = Result([[] for _ in rows], ["length"] * len(rows), Stats())
        for _ in stream(self.engine, request, result):
            pass
        return [self._drawn(call, result, row) for row, call in enumerate(batch)]

    def _drawn(self, call: Drawing, result: Result, row: int) -> Drawn:
        ids = result.drawn[row]
        # Where a stop string ended the row, its tokens were drawn and are not in the text.
        ended = result.finish[row] == "stop" and len(result.tokens[row]) == len(ids)
        count, text = cut(self.tokenizer, call.prompt, ids, call.how.stop)
        stopped = found(text, call.how.stop) is not None
        finish = "stop" if stopped else "end" if ended else "length"
        # With a drafter calls are counted of all rows together; there is one, unless asked otherwise.
        draft = result.stats.draft
        steps = count - 1 + (finish == "end") if draft is None else round(draft.calls / self.rows)
        return Drawn(tuple(ids[:count]), finish, text, len(pieces(len(call.prompt), self.engine.context)) + steps)

    # ---- scoring

    def _cuts(self, call: Scoring) -> list[tuple[int, int]]:
        """(start, size) of the pieces that all but the last token of the prompt are read in."""
        return pieces(len(call.prompt) - 1, self.engine.context)

    def _value_cuts(self, call: Scoring) -> list[tuple[int, int]]:
        """(start, size), from the prompt's last token on."""
        count, start, out = len(call.ids) + call.ended, 0, list[tuple[int, int]]()
        room = count if self.engine.context is None else self.engine.context - len(call.prompt) + 1
        while start < count:
            size = next((size for size in _SIZES if size >= count - start), _SIZES[-1])
            # Past a table of positions there may be NaN.
            out.append((start, size if self.engine.context is None else min(size, room - start)))
            start += out[-1][1]
        return out

    def _scored(self, batch: Sequence[Scoring]) -> list[Scored]:
        rows = _filled(batch, self.rows)
        cuts, values = self._cuts(rows[0]), self._value_cuts(rows[0])
        cache = self.engine.empty(len(rows), _end(cuts) + _end(values))
        heads = np.asarray([len(call.prompt) - 1 for call in rows], np.int32)
        for start, size in cuts:
            tokens = _padded([call.prompt[:-1][start : start + size] for call in rows], size)
            _, cache = self.engine.extend(tokens, cache, jnp.asarray(np.clip(heads - start, 0, size)))
        model, sampled, end = list[Any](), list[Any](), list[Any]()
        for start, size in values:
            given = _padded([(call.prompt[-1:] + call.ids)[start : start + size] for call in rows], size)
            wanted = _padded([call.ids[start : start + size] for call in rows], size)
            logits, cache = self.engine.extend(given, cache)
            parts = self._scores(logits, wanted, batch[0].sampling)
            for column, part in zip((model, sampled, end), parts, strict=True):
                column.append(np.asarray(part, np.float64))
        columns = [np.concatenate(column, axis=1) for column in (model, sampled, end)]
        return [self._row(call, *(column[row] for column in columns)) for row, call in enumerate(batch)]

    def _scores(self, logits: jax.Array, wanted: jax.Array, sampling: Sampling) -> tuple[jax.Array, ...]:
        eos = jnp.asarray(self.engine.eos or (-1,), jnp.int32)
        options = {"greedy": sampling.greedy, "filters": sampling.filters}
        return _scores(logits, wanted, eos, sampling.numbers(), **options)

    def _row(self, call: Scoring, model: np.ndarray, sampled: np.ndarray, end: np.ndarray) -> Scored:
        """Of one call; end[t,2]: the log-probability that the text ends there, as modelled and as sampled."""
        n = len(call.ids)
        last = [end[n]] if call.ended else []
        tokens = [*model[:n], *(both[0] for both in last)]
        proposal = float(sampled[:n].sum() + sum(both[1] for both in last))
        return Scored(tuple(map(float, tokens)), proposal, len(self._cuts(call)) + len(self._value_cuts(call)))


def _key(digest: Hashable, call: Call) -> Hashable:
    """Of the cache: the model's hash instead of the model."""
    if isinstance(call, Scoring):
        return digest, call.prompt, call.ids, call.ended, call.sampling
    return digest, call.prompt, call.how, call.key


def _filled(batch: Sequence[Any], rows: int) -> list[Any]:
    """The batch with its first call repeated up to so many rows."""
    return [*batch, *[batch[0]] * (rows - len(batch))]


def _end(cuts: Sequence[tuple[int, int]]) -> int:
    return sum(cuts[-1]) if cuts else 0


def _padded(rows: Sequence[Sequence[int]], width: int) -> jax.Array:
    """i32[b,width], zeros on the right."""
    out = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(out, rows):
        row[: len(ids)] = ids
    return jnp.asarray(out)


@partial(jax.jit, static_argnames=("greedy", "filters"))
def _scores(
    logits: jax.Array, wanted: jax.Array, eos: jax.Array, numbers: Numbers, *, greedy: bool, filters: frozenset[str]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of wanted[b,t] by the model and as sampled, and of the end, [b,t,2], in both ways."""
    logits = logits.astype(jnp.float32)
    model = jax.nn.log_softmax(logits)
    pick, ending = partial(_pick, wanted), partial(_ending, eos)
    if greedy:  # the token drawn is the only one that could be
        zeros = jnp.zeros(wanted.shape, jnp.float32)
        return pick(model), zeros, jnp.stack([ending(model), zeros], axis=-1)
    b, t, vocab = logits.shape
    tempered = logits / numbers["temperature"]
    left = filtered(tempered.reshape(b * t, vocab), numbers, filters).reshape(b, t, vocab)
    # What was drawn had passed the filters; rounding must not drop it here.
    drawn = jax.nn.one_hot(wanted, vocab, dtype=bool)
    sampled = jax.nn.log_softmax(jnp.where(drawn, tempered, left))
    ended = ending(jax.nn.log_softmax(left))
    return pick(model), pick(sampled), jnp.stack([ending(model), ended], axis=-1)


def _pick(wanted: jax.Array, logp: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logp, wanted[..., None], axis=-1)[..., 0]


def _ending(eos: jax.Array, logp: jax.Array) -> jax.Array:
    """Log-probability [b,t] of any of the tokens that end a text; -inf where there are none."""
    found = jnp.take(logp, jnp.maximum(eos, 0), axis=-1)
    return jax.nn.logsumexp(jnp.where(eos >= 0, found, -jnp.inf), axis=-1)
