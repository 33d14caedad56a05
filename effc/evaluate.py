"""Quality of a module on text: perplexity, bits per byte, and how far it is from another module.

The text is cut into windows that do not overlap; every token of a window is scored but the first,
which nothing precedes. Where the tokenizer begins texts with a token of its own (BOS), each window
begins with it and every token of the text is scored. Windows shorter than the others are left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.errors import EffcError
from effc.frontend.tokenizer import Tokenizer
from effc.ir.core import Module
from effc.ir.stream import Piece, run_chunks
from effc.ir.types import evaluate
from effc.memory import give_back
from effc.weights import Lazy, nbytes

Store = Mapping[str, Lazy]
Side = tuple[Module, Store]

WINDOW = 512
SLICE_BYTES = 8 << 20
"""Logits worked on at a time."""


@dataclass(frozen=True)
class Windows:
    """Token ids i32[1,n], how many of each are only context, and the bytes of text that are scored."""

    chunks: tuple[np.ndarray, ...]
    context: int
    nbytes: int | None = None
    sha256: str = ""
    source: str = ""

    def ids(self) -> np.ndarray:
        """All of it in one line, i32[n]."""
        return np.concatenate([chunk[0] for chunk in self.chunks])

    @property
    def scored(self) -> int:
        """Tokens whose probability counts."""
        return sum(chunk.shape[1] - self.context for chunk in self.chunks)


@dataclass(frozen=True)
class Quality:
    """Means over the scored tokens; kl (nats a token) and top1 compare with another module."""

    tokens: int
    nats: float
    nbytes: int | None = None
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-likelihood of a token."""
        return math.exp(min(self.nats, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to code a byte of the text."""
        return self.nats * self.tokens / math.log(2) / self.nbytes if self.nbytes else None

    def json(self) -> dict[str, Any]:
        """Every number by name."""
        own = {"tokens": self.tokens, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return own | {"kl": self.kl, "top1": self.top1}


# ---- text


def default_text() -> tuple[str, str]:
    """Text that every machine has, and what it is: the help topics that come with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics)), "Python's help topics"


def read_text(path: Path | None) -> tuple[str, str]:
    """The file's text and its name, or the default text."""
    if path is None:
        return default_text()
    try:
        return path.read_text(), path.name
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise EffcError(f"{path}: {why}, want a text file to evaluate on") from None


def windows(tokenizer: Tokenizer, text: str, *, window: int = WINDOW, tokens: int = 0, source: str = "") -> Windows:
    """The first `tokens` tokens of the text (0: all) in windows; EffcError for too short a text."""
    bare = tokenizer.rust.encode(_enough(text, tokens), add_special_tokens=False)
    head = prefix(tokenizer)
    ids, ends = bare.ids[: tokens or None], [0, *(end for _, end in bare.offsets)]
    body = min(window - len(head), len(ids))
    if body < 2:
        raise EffcError(f"{source or 'text'}: {len(ids)} tokens, want 2 or more to evaluate on")
    starts = range(0, len(ids) - body + 1, body)
    chunks = tuple(np.asarray([[*head, *ids[i : i + body]]], np.int32) for i in starts)
    skip = 0 if head else 1
    nbytes = sum(len(text[ends[i + skip] : ends[i + body]].encode()) for i in starts)
    sha = hashlib.sha256(text.encode()).hexdigest()
    return Windows(chunks, len(head) or 1, nbytes, sha, source)


def random_windows(vocab: int, *, window: int, tokens: int, seed: int) -> Windows:
    """Ids drawn at random, for models without a tokenizer: enough to compare two modules."""
    rng = np.random.default_rng(seed)
    count = max(1, tokens // window)
    chunks = tuple(rng.integers(0, vocab, (1, window), np.int32) for _ in range(count))
    return Windows(chunks, 1, source="random tokens")


def _enough(text: str, tokens: int) -> str:
    """The start of the text that surely holds so many tokens: long texts are slow to encode."""
    return text[: 40 * tokens] if tokens else text


def prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every text."""
    plain, whole = (tokenizer.rust.encode("a", add_special_tokens=on).ids for on in (False, True))
    place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return list(whole[:place])


# ---- numbers


def vocab_of(module: Module) -> int:
    """Columns of the logits."""
    return evaluate(module.forward().result_types()[0].shape[-1], {})


def quality(side: Side, text: Windows, progress: Callable[[int], None] | None = None) -> Quality:
    """How well the module tells the text; one pass over its weights."""
    return _measure(side, None, text, progress)[0]


def compare(
    before: Side, after: Side, text: Windows, progress: Callable[[int], None] | None = None
) -> tuple[Quality, Quality]:
    """Quality of both; the second with its divergence from the first and how often the top token is the same."""
    mine, other = _measure(before, after, text, progress)
    assert other is not None
    return mine, other


def _measure(
    one: Side, two: Side | None, text: Windows, progress: Callable[[int], None] | None
) -> tuple[Quality, Quality | None]:
    sums = np.zeros(4)
    for chunk, start, pieces in _together([one, *([two] if two else [])], text):
        ids, at = text.chunks[chunk], np.arange(start, start + pieces[0].shape[1])
        scored = (at >= text.context - 1) & (at + 1 < ids.shape[1])
        targets = ids[0, np.minimum(at + 1, ids.shape[1] - 1)]
        sums += np.asarray(_sums()(pieces[0][0], pieces[-1][0], targets, scored), np.float64)
        if progress:
            progress(int(scored.sum()))
    mean = sums / max(text.scored, 1)
    check_finite(mean, "evaluate")
    first = Quality(text.scored, float(mean[0]), text.nbytes)
    if two is None:
        return first, None
    return first, Quality(text.scored, float(mean[1]), text.nbytes, max(0.0, float(mean[2])), float(mean[3]))


def _together(sides: Sequence[Side], text: Windows) -> Iterator[tuple[int, int, list[jax.Array]]]:
    """Logits of the same tokens from every side, a slice at a time."""
    # The smaller side first: what it keeps for its logits is held while the other's layers run.
    order = sorted(range(len(sides)), key=lambda i: nbytes(sides[i][0]))
    streams = {i: _primed(pieces(sides[i], text)) for i in order}
    for same in zip(*(streams[i] for i in range(len(sides))), strict=True):
        assert len({(p.chunk, p.start, p.logits.shape) for p in same}) == 1
        yield same[0].chunk, same[0].start, [p.logits for p in same]


def _primed(stream: Iterator[Piece]) -> Iterator[Piece]:
    """Run up to the first logits, then give back what the layers took: the next side needs it."""
    first = next(stream)
    give_back()
    return chain([first], stream)


def pieces(side: Side, text: Windows) -> Iterator[Piece]:
    """Pieces of at most `rows` tokens, however many the evaluator gives at once."""
    module, store = side
    rows = max(16, SLICE_BYTES // (4 * vocab_of(module)))
    for piece in run_chunks(module, store, [jnp.asarray(c) for c in text.chunks], rows=rows):
        for at in range(0, piece.logits.shape[1], rows):
            yield Piece(piece.chunk, piece.start + at, piece.logits[:, at : at + rows])


@cache
def _sums() -> Callable[..., jax.Array]:
    """Of the scored rows: nats of the one, nats of the other, divergence, agreement."""

    def call(p: jax.Array, q: jax.Array, targets: jax.Array, scored: jax.Array) -> jax.Array:
        p, q = p.astype(jnp.float32), q.astype(jnp.float32)
        log_z = [jax.nn.logsumexp(x, axis=-1) for x in (p, q)]
        told = [jnp.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in (p, q)]
        # sum p (log p - log q) with the normalisers taken out: nothing as large as the logits is kept
        apart = jnp.sum(jnp.exp(p - log_z[0][:, None]) * (p - q), axis=-1)
        same = (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(jnp.float32)
        rows = (log_z[0] - told[0], log_z[1] - told[1], apart - log_z[0] + log_z[1], same)
        return jnp.stack([jnp.sum(jnp.where(scored, x, 0.0)) for x in rows])

    return jax.jit(call)


# ---- a few tokens, to hold one set of logits against another


def logits(side: Side, tokens: np.ndarray) -> np.ndarray:
    """f32[n,V] of tokens i32[1,n]."""
    found = pieces(side, Windows((tokens,), 1))
    return np.concatenate([np.asarray(piece.logits[0], np.float32) for piece in found])


def gap(before: np.ndarray, after: np.ndarray) -> float:
    """The greatest difference as a share of the range of `before`."""
    wide = float(before.max() - before.min())
    moved = float(np.max(np.abs(after - before)))
    return moved / wide if wide else math.inf if moved else 0.0


def check_finite(values: np.ndarray, where: str) -> None:
    """EffcError for NaN or infinity."""
    if not np.isfinite(values).all():
        raise EffcError(f"{where}: the logits hold NaN or infinity, want finite numbers (are the weights sound?)")


def fingerprint(side: Side, tokens: np.ndarray) -> dict[str, Any]:
    """A few logits to recognise the model by: those of the last token's likeliest successors."""
    values = logits(side, tokens)
    ids = np.argsort(values[-1])[::-1][:8]
    wide = float(values.max() - values.min())
    return {
        "tokens": tokens[0].tolist(),
        "ids": ids.tolist(),
        "logits": [float(values[-1, i]) for i in ids],
        "range": wide,
    }


def recognise(side: Side, mark: Mapping[str, Any], tolerance: float = 1e-3) -> str:
    """What is wrong where the logits are not those of the fingerprint; nothing where they are."""
    values = logits(side, np.asarray([mark["tokens"]], np.int32))[-1]
    moved = max(abs(float(values[i]) - was) for i, was in zip(mark["ids"], mark["logits"], strict=True))
    limit = tolerance * mark["range"]
    return (
        f"logits differ by {moved:.3g} from those it was written with, want {limit:.3g} at most"
        if not moved <= limit
        else ""
    )
