"""Tokenizers: from GGUF metadata against their originals, streaming, end tokens, chats."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers, trainers

from effc.errors import EffcError
from effc.frontend.source import TokenizerFiles
from effc.frontend.tokenizer import Tokenizer

pytest.importorskip("gguf")
from effc.frontend.checkpoints import gguf_tokenizer

TEXT = topics["class"]
VARIED = [
    "caf\u00e9 \u65e5\u672c\u8a9e",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 ok",
    " a",
    "\n\n",
    "\ufffd!",
    "",
]


@pytest.fixture(scope="module")
def rust() -> Rust:
    """Byte-level BPE of 300 tokens: most characters beyond ASCII take several."""
    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator([TEXT], trainer)
    return rust


def with_extra(rust: Rust, **extra: Any) -> Tokenizer:
    return Tokenizer(
        TokenizerFiles(rust.to_str().encode(), {f"{k}.json": json.dumps(v).encode() for k, v in extra.items()})
    )


@pytest.mark.parametrize("text", [*VARIED, TEXT[:400]])
def test_streamed_text_is_the_decoded_text(rust: Rust, text: str) -> None:
    tokenizer = with_extra(rust)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text


def test_stream_holds_back_half_a_character(rust: Rust) -> None:
    tokenizer = with_extra(rust)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode("\U0001f600")]
    assert pieces == ["", "", "", "\U0001f600"]


def test_stream_gives_broken_bytes_only_at_the_end(rust: Rust) -> None:
    tokenizer = with_extra(rust)
    stream = tokenizer.stream()
    assert stream.extend(tokenizer.encode("a\U0001f600")[:-1]) == "a"
    assert stream.flush() == "\ufffd"


def test_stream_after_a_prompt_keeps_the_space() -> None:
    tokenizer = sentence_piece()
    ids = tokenizer.encode("The value of", specials=False)
    stream = tokenizer.stream(ids[:2])
    assert tokenizer.decode(ids[:2]) + stream.extend(ids[2:]) == "The value of"


def test_end_tokens_come_from_both_configs(rust: Rust) -> None:
    tokenizer = with_extra(
        rust, generation_config={"eos_token_id": [7, 9]}, tokenizer_config={"eos_token": {"content": "<end>"}}
    )
    assert tokenizer.eos_ids == (7, 9, 1)
    assert with_extra(rust, generation_config={"eos_token_id": 1}).eos_ids == (1,)
    assert with_extra(rust).eos_ids == ()


def test_special_tokens_are_hidden_unless_asked_for(rust: Rust) -> None:
    tokenizer = with_extra(rust)
    ids = tokenizer.encode("hi<end>")
    assert ids[-1] == 1
    assert (tokenizer.decode(ids), tokenizer.decode(ids, specials=True)) == ("hi", "hi<end>")


def test_chat_template(rust: Rust) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = with_extra(rust, tokenizer_config={"chat_template": template, "bos_token": "<s>"})
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat(messages) == "<s>[user] Hi\n[assistant]"
    assert tokenizer.apply_chat(messages, generation_prompt=False) == "<s>[user] Hi\n"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "no chat template"),
        ({"chat_template": "{{ raise_exception('roles must alternate') }}"}, "roles must alternate"),
        ({"chat_template": "{% for %}"}, "chat template:"),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "chat template: access to attribute '__class__'"),
    ],
)
def test_chat_template_faults(rust: Rust, config: dict, words: str) -> None:
    with pytest.raises(EffcError, match=words):
        with_extra(rust, tokenizer_config=config).apply_chat([{"role": "user", "content": "Hi"}])


def test_broken_tokenizer_json() -> None:
    with pytest.raises(EffcError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(TokenizerFiles(b"{}"))


def metadata(rust: Rust, **more: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for a byte-level tokenizer."""
    state = json.loads(rust.to_str())
    tokens = [rust.id_to_token(i) for i in range(rust.get_vocab_size())]
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    kinds = [gguf_tokenizer.CONTROL if token in ("<s>", "<end>") else 1 for token in tokens]
    return {
        "tokens": tokens,
        "merges": merges,
        "token_type": kinds,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }


def rebuilt(data: dict[str, Any], pre: str) -> Tokenizer:
    inner, bos = gguf_tokenizer.byte_level(data, gguf_tokenizer.splitting(pre, "m.gguf"))
    gguf_tokenizer.add_specials(inner, data)
    gguf_tokenizer.frame(inner, data, bos)
    return Tokenizer(TokenizerFiles(inner.to_str().encode(), gguf_tokenizer.extras(data, None)))


@pytest.mark.parametrize("text", [*VARIED, TEXT[:400], "x<end>y", "<s>"])
def test_gguf_byte_level_equals_its_original(rust: Rust, text: str) -> None:
    tokenizer = rebuilt(metadata(rust), "gpt-2")
    assert tokenizer.encode(text) == rust.encode(text).ids
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.bos_id == 0


def test_gguf_begin_and_end_tokens(rust: Rust) -> None:
    plain = rust.encode("hi").ids
    assert rebuilt(metadata(rust), "llama-bpe").encode("hi") == [0, *plain]  # llama.cpp's default for Llama 3
    assert rebuilt(metadata(rust, add_bos_token=False), "llama-bpe").encode("hi") == plain
    assert rebuilt(metadata(rust, add_eos_token=True), "gpt-2").encode("hi") == [*plain, 1]
    assert rebuilt(metadata(rust, eot_token_id=5), "gpt-2").eos_ids == (1, 5)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", r"it|'s| x|123|,| 45|\n\n\n | DON|'|T|\n|\n|1"),
        ("smollm", r"it|'s| x|1|2|3|,| |4|5|\n\n\n | DON|'|T|\n\n|1"),
        ("llama-bpe", r"it|'s| x|123|,| |45|\n\n\n| | DON|'T|\n\n|1"),
        ("qwen2", r"it|'s| x|1|2|3|,| |4|5|\n\n\n| | DON|'T|\n\n|1"),
    ],
)
def test_gguf_text_is_cut_as_llama_cpp_cuts_it(rust: Rust, pre: str, pieces: str) -> None:
    """smollm cuts digits out first: newlines before a digit stay together (transformers misses that)."""
    tokenizer = rebuilt(metadata(rust), pre).rust
    text = "it's x123, 45\n\n\n  DON'T\n\n1"
    spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert "|".join(text[a:b] for a, b in spans) == pieces.replace(r"\n", "\n")


def sentence_piece() -> Tokenizer:
    golden = json.loads((Path(__file__).parent / "data" / "sentencepiece.json").read_text())
    data = {"tokens": golden["tokens"], "scores": golden["scores"], "token_type": golden["kinds"]}
    data |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    inner = gguf_tokenizer.sentence_piece(data)
    gguf_tokenizer.add_specials(inner, data)
    gguf_tokenizer.frame(inner, data, bos_by_default=True)
    return Tokenizer(TokenizerFiles(inner.to_str().encode(), gguf_tokenizer.extras(data, None)))


def test_gguf_sentence_piece_equals_the_library() -> None:
    """data/sentencepiece.json holds the library's own encodings (data/make_sentencepiece.py)."""
    golden = json.loads((Path(__file__).parent / "data" / "sentencepiece.json").read_text())
    tokenizer = sentence_piece()
    for text, ids in zip(golden["texts"], golden["ids"], strict=True):
        assert tokenizer.encode(text, specials=False) == ids
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert tokenizer.encode("Hello")[0] == 1
