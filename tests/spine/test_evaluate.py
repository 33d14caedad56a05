"""Perplexity, divergence and agreement against the plain formulas; windows of text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from effc import evaluate
from effc.errors import EffcError
from effc.evaluate import Windows, compare, quality, random_windows, windows
from effc.frontend.source import TokenizerFiles
from effc.frontend.tokenizer import Tokenizer
from effc.ir.stream import run
from effc.weights import Lazy, Store


def letters(bos: bool = False) -> Tokenizer:
    """A token a letter; perhaps with one before every text."""
    vocab = {"<s>": 0, **{c: i + 1 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz é")}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    post = {
        "type": "TemplateProcessing",
        "single": begin + single,
        "pair": single,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    data = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "."},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": post if bos else None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<s>"},
    }
    return Tokenizer(TokenizerFiles(json.dumps(data).encode()))


def logits_of(side, chunk: np.ndarray) -> np.ndarray:
    return np.asarray(run(side[0], side[1], jnp.asarray(chunk)), np.float64)[0]


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def sides(tiny, random_store, apply):
    store = random_store(tiny)
    return (tiny, store), apply(tiny, store, "quant4")[:2]


@pytest.mark.parametrize("context", [1, 2])
def test_the_plain_formulas(context: int, sides) -> None:
    before, after = sides
    rng = np.random.default_rng(0)
    text = Windows(tuple(rng.integers(0, 160, (1, 9), np.int32) for _ in range(2)), context, nbytes=40)
    first, second = compare(before, after, text)
    nats, kl, same = [[], []], [], []
    for chunk in text.chunks:
        p, q = (log_softmax(logits_of(side, chunk)) for side in (before, after))
        for at in range(context - 1, 8):
            nats[0].append(-p[at, chunk[0, at + 1]])
            nats[1].append(-q[at, chunk[0, at + 1]])
            kl.append(np.sum(np.exp(p[at]) * (p[at] - q[at])))
            same.append(p[at].argmax() == q[at].argmax())
    assert first.tokens == second.tokens == len(kl) == text.scored
    assert first.perplexity == pytest.approx(math.exp(np.mean(nats[0])), rel=1e-4)
    assert second.perplexity == pytest.approx(math.exp(np.mean(nats[1])), rel=1e-4)
    assert second.kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert second.top1 == pytest.approx(np.mean(same))
    assert first.bits_per_byte == pytest.approx(np.sum(nats[0]) / math.log(2) / 40, rel=1e-4)
    assert first.kl is None


def test_slices_do_not_show(sides, monkeypatch) -> None:
    text = random_windows(160, window=40, tokens=80, seed=1)
    whole = compare(*sides, text)  # pyright: ignore
    monkeypatch.setattr(evaluate, "SLICE_BYTES", 16 * 4 * 160)
    cut = compare(*sides, text)  # pyright: ignore
    assert [q.nats for q in cut] == pytest.approx([q.nats for q in whole], rel=1e-5)
    assert cut[1].kl == pytest.approx(whole[1].kl, rel=1e-4)


def test_a_model_is_no_way_from_itself(sides) -> None:
    text = random_windows(160, window=16, tokens=16, seed=0)
    same = compare(sides[0], sides[0], text)[1]
    assert (same.kl, same.top1) == (0.0, 1.0)
    assert quality(sides[0], text).nats == same.nats


def test_windows_of_text() -> None:
    text = windows(letters(), "abcdefghij", window=4, source="ten letters")
    assert [c.tolist() for c in text.chunks] == [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
    assert (text.scored, text.nbytes, text.context) == (6, 6, 1)


def test_windows_begin_as_the_tokenizer_begins_texts() -> None:
    text = windows(letters(bos=True), "abcdefghij", window=4)
    assert [c.tolist() for c in text.chunks] == [[[0, 1, 2, 3]], [[0, 4, 5, 6]], [[0, 7, 8, 9]]]
    assert (text.scored, text.nbytes, text.context) == (9, 9, 1)


def test_bytes_are_of_utf8_and_tokens_are_counted() -> None:
    text = windows(letters(), "éaéaéa", window=3, tokens=4)
    assert len(text.chunks) == 1
    assert text.nbytes == 3


def test_short_text_is_one_short_window_or_refused() -> None:
    assert windows(letters(), "abc", window=512).chunks[0].shape == (1, 3)
    with pytest.raises(EffcError, match="text: 1 tokens, want 2 or more"):
        windows(letters(), "a")


def test_the_default_text_is_on_every_machine() -> None:
    text, name = evaluate.read_text(None)
    assert len(text) > 100_000
    assert name == "Python's help topics"


def test_a_text_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EffcError, match=r"none: No such file or directory, want a text file"):
        evaluate.read_text(tmp_path / "none")
    (tmp_path / "bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EffcError, match="bin: not UTF-8 text"):
        evaluate.read_text(tmp_path / "bin")


def test_logits_that_are_not_finite_are_told(tiny, random_store) -> None:
    store = random_store(tiny)
    lazy = store["norm"]
    bad = Store({**store.entries, "norm": Lazy(lazy.param, lambda i: {"": np.full(64, np.inf, np.float32)})})
    with pytest.raises(EffcError, match="evaluate: the logits hold NaN or infinity"):
        quality((tiny, bad), random_windows(160, window=8, tokens=8, seed=0))


def test_fingerprints(sides) -> None:
    before, after = sides
    tokens = np.arange(8, dtype=np.int32)[None]
    mark = json.loads(json.dumps(evaluate.fingerprint(before, tokens)))
    assert evaluate.recognise(before, mark) == ""
    assert evaluate.recognise(after, mark).startswith("logits differ by ")
    gap = evaluate.gap(evaluate.logits(before, tokens), evaluate.logits(after, tokens))
    assert 0 < gap < 1
