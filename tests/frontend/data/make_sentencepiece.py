"""Writes sentencepiece.json: a small model and its own encodings (needs sentencepiece)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece as sp

TEXTS = [
    "Hello world",
    " leading space",
    "two  spaces   three",
    "",
    " ",
    "The value of the expression is 12345.",
    "def f(x):\n    return x + 1\n",
    "tab\tand newline\n\n",
    "na\u00efve caf\u00e9",
    "\u65e5\u672c\u8a9e \U0001f600 end",
    'it\'s "quoted" (and bracketed) [x] {y}',
    "UPPER lower MiXeD",
    "\u2581 the mark itself",
    "aaaaaaaaaaaa",
    "statement statements stated",
]


def main() -> None:
    model = io.BytesIO()
    lines = [line for name in sorted(topics)[:40] for line in topics[name].split("\n") if line.strip()]
    sp.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
    )
    p = sp.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(p.get_piece_size())
    kinds = [2 if p.is_unknown(i) else 3 if p.is_control(i) else 6 if p.is_byte(i) else 1 for i in ids]
    more = [topics[name][i : i + 200] for i, name in zip(range(0, 2000, 50), sorted(topics)[40:])]
    texts = TEXTS + more
    out = {
        "tokens": [p.id_to_piece(i) for i in ids],
        "scores": [p.get_score(i) for i in ids],
        "kinds": kinds,
        "texts": texts,
        "ids": [p.encode(text) for text in texts],
    }
    Path(__file__).with_name("sentencepiece.json").write_text(json.dumps(out))


main()
