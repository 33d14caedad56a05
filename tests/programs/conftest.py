"""A small engine with random weights and a tokenizer of its own, made in a second; the bundled model, opened once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from effc.frontend.source import TokenizerFiles
from effc.frontend.tokenizer import Tokenizer
from effc.generator import Generator, engine_of
from effc.ir.parser import parse
from effc.opened import Opened
from effc.programs import LM
from tests.backend.conftest import random_store
from tests.runtime.conftest import TINY

WORDS = ["\u0120import", "\u0120os", "import", "os", "ab", "ra", "\u0120the", "\u010a\u010a"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789AB.:(", "\u0120", "\u010a", "<end>"]
VOCAB = 64


def tokenizer_files() -> TokenizerFiles:
    """Byte-level BPE as GPT-2 has it: letters, space and newline; merges take a leading space along."""
    tokens, merges = list(LETTERS), list[list[str]]()
    for word in WORDS:
        for n in range(2, len(word) + 1):
            if word[:n] not in tokens:
                merges.append([word[: n - 1], word[n - 1]])
                tokens.append(word[:n])
    assert len(tokens) <= VOCAB
    end = {"id": LETTERS.index("<end>"), "content": "<end>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    whole = {"version": "1.0", "added_tokens": [end | flags], "normalizer": None, "post_processor": None}
    whole |= {"pre_tokenizer": level, "decoder": level, "model": model}
    config = json.dumps({"eos_token": "<end>"}).encode()
    return TokenizerFiles(json.dumps(whole).encode(), {"tokenizer_config.json": config})


@pytest.fixture(scope="session")
def opened() -> Opened:
    """Two hundred positions, three layers, random weights."""
    module = parse(TINY.read_text())
    store: Any = random_store(module)
    return Opened(Path("tiny"), module, store, tokenizer_files())


@pytest.fixture(scope="session")
def generator(opened: Opened) -> Generator:
    words = Tokenizer(opened.files, "tiny")
    return Generator(engine_of(opened, words.eos_ids), words)


@pytest.fixture(scope="session")
def lm(generator: Generator) -> LM:
    """Of the small engine."""
    return LM(generator, rows=4)


@pytest.fixture(scope="session")
def bundled(checkpoint: Path) -> LM:
    """Of the bundled model."""
    return LM(checkpoint, rows=4)
