"""The tokenizer in a GGUF file's metadata, rebuilt as a tokenizer.json with llama.cpp's splitting rules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from effc.errors import EffcError, nearest
from effc.frontend.source import TokenizerFiles

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = WORDS + r"\p{N}{1,3}" + REST
QWEN2 = WORDS + r"\p{N}" + REST
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """How text is cut before merging. regex None is GPT-2's; whole: a piece that is a token skips merging."""

    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False


SPLITTINGS: Mapping[str, Splitting] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), Splitting()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), Splitting(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), Splitting(LLAMA3, whole=True, bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting(LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), Splitting(QWEN2, nfc=True)),
    "tekken": Splitting(TEKKEN, whole=True, bos=True),
}
"""llama.cpp's names for pre-tokenizers (src/llama-vocab.cpp)."""

CONTROL, USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
PREFIX = "tokenizer.ggml."
SPACE = "\u2581"  # how SentencePiece writes a space


def tokenizer_files(fields: Mapping[str, Any], where: str) -> TokenizerFiles | None:
    """None when the file has no tokenizer; an error when it has one of a kind that is not known."""
    data = {n.removeprefix(PREFIX): value for n, value in fields.items() if n.startswith(PREFIX)}
    kind = data.get("model", "none")
    if kind == "none":
        return None
    if kind == "gpt2":
        by_default = "gpt-2" if fields["general.architecture"] == "gpt2" else "default"
        tokenizer, bos = byte_level(data, splitting(data.get("pre") or by_default, where))
    elif kind == "llama":
        tokenizer, bos = sentence_piece(data), True
    else:
        raise EffcError(
            f"{where}: tokenizer model '{kind}' is not supported, want gpt2 (byte-level BPE) or llama (SentencePiece)"
        )
    add_specials(tokenizer, data)
    frame(tokenizer, data, bos)
    return TokenizerFiles(tokenizer.to_str().encode(), extras(data, fields.get("tokenizer.chat_template")))


def splitting(pre: str, where: str) -> Splitting:
    if pre not in SPLITTINGS:
        raise EffcError(
            f"{where}: pre-tokenizer '{pre}' is not known, want {', '.join(SPLITTINGS)}{nearest(pre, SPLITTINGS)}"
        )
    return SPLITTINGS[pre]


def byte_level(data: Mapping[str, Any], rule: Splitting) -> tuple[Tokenizer, bool]:
    vocab = {token: i for i, token in enumerate(data["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in data["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.whole))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    steps += [pre_tokenizers.Split(Regex(rule.regex), "isolated")] if rule.regex else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.regex is None)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, rule.bos


def sentence_piece(data: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece merges the adjacent pair whose union scores highest: BPE with merges ranked by score."""
    tokens, scores = data["tokens"], data["scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    kinds = data.get("token_type") or [gguf.TokenType.NORMAL] * len(tokens)
    plain = {token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.NORMAL}
    pairs = [
        (scores[vocab[t]], t[:i], t[i:]) for t in plain for i in range(1, len(t)) if t[:i] in plain and t[i:] in plain
    ]
    pairs.sort(key=lambda p: (-p[0], -len(p[1]), -len(p[2]), vocab[p[1]], vocab[p[2]]))
    unknown = tokens[data.get("unknown_token_id", 0)]
    bpe = models.BPE(vocab=vocab, merges=[p[1:] for p in pairs], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    prefix = data.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def add_specials(tokenizer: Tokenizer, data: Mapping[str, Any]) -> None:
    """Control tokens are cut out of the text first and not shown; user-defined ones are cut out and shown."""
    pairs = list(zip(data["tokens"], data.get("token_type") or [], strict=False))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in pairs if kind == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in pairs if kind == USER_DEFINED])


def frame(tokenizer: Tokenizer, data: Mapping[str, Any], bos_by_default: bool) -> None:
    """Begin and end tokens as the file wants them added."""
    pieces, used = ["$A"], []
    if data.get("add_bos_token", bos_by_default) and data.get("bos_token_id") is not None:
        used.append(_special(data, "bos"))
        pieces.insert(0, used[-1][0])
    if data.get("add_eos_token", False) and data.get("eos_token_id") is not None:
        used.append(_special(data, "eos"))
        pieces.append(used[-1][0])
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(pieces), special_tokens=used)


def extras(data: Mapping[str, Any], template: str | None) -> dict[str, bytes]:
    """The files a Hugging Face folder would have beside tokenizer.json."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {
        f"{name}_token": _special(data, key)[0]
        for name, key in names.items()
        if data.get(f"{key}_token_id") is not None
    }
    ends = [data[key] for key in ("eos_token_id", "eot_token_id") if data.get(key) is not None]
    generation = {"eos_token_id": list(dict.fromkeys(ends)), "bos_token_id": data.get("bos_token_id")}
    if template:
        config["chat_template"] = template
    return {
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }


def _special(data: Mapping[str, Any], key: str) -> tuple[str, int]:
    token = int(data[f"{key}_token_id"])
    return data["tokens"][token], token
