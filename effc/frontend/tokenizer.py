"""Text <-> token ids: a thin wrapper over tokenizers.Tokenizer that knows end tokens, chats and streaming."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Rust

from effc.errors import EffcError
from effc.frontend.source import TokenizerFiles

BROKEN = "\ufffd"  # what a decoder prints for bytes that are not a whole character


class Tokenizer:
    """encode, decode, stream(), eos_ids, apply_chat."""

    def __init__(self, files: TokenizerFiles | None, where: str = "tokenizer"):
        if files is None:
            raise EffcError(f"{where}: no tokenizer.json, want one beside the weights (save_pretrained writes it)")
        self.where = where
        self.files = files
        self.rows: int | None = None
        try:
            self.rust = Rust.from_buffer(files.json)
        except (ValueError, UnicodeDecodeError) as error:
            raise EffcError(f"{where}: tokenizer.json cannot be read: {error}") from None
        self.rust.no_padding()
        self.rust.no_truncation()

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """specials: add begin and end tokens as set up; off for text that a chat template made."""
        ids = self.rust.encode(text, add_special_tokens=specials).ids
        if self.rows is not None and ids and max(ids) >= self.rows:
            token = self.rust.id_to_token(max(ids))
            raise EffcError(
                f"{self.where}: token '{token}' is {max(ids)}, but the model has {self.rows} embedding rows"
            )
        return ids

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """specials: show tokens like <|im_end|>."""
        return self.rust.decode(list(ids), skip_special_tokens=not specials)

    def stream(self, prompt: Sequence[int] = ()) -> Stream:
        """Text as tokens come; prompt is what they follow (a leading space depends on it)."""
        return Stream(self, prompt)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.rust.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_fits(self, rows: int) -> None:
        """Refuses a tokenizer with more tokens than embedding rows: JAX would clamp their ids silently.

        Special tokens beyond the last row are let in, as published models have them (Gemma 3's image token);
        encode refuses their use.
        """
        self.rows = rows
        added = self.rust.get_added_tokens_decoder()
        over = [i for i in self.rust.get_vocab(with_added_tokens=True).values() if i >= rows]
        over = [i for i in over if i not in added or not added[i].special]
        if over:
            raise EffcError(
                f"{self.where}: the tokenizer has {self.vocab_size} tokens, the model {rows} embedding rows "
                f"(first without one: '{self.rust.id_to_token(min(over))}'); want the model's own tokenizer"
            )

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return self._json("tokenizer_config.json")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: generation_config.json may list several."""
        ids = self._json("generation_config.json").get("eos_token_id")
        ids = [ids] if isinstance(ids, int) else list(ids or [])
        token = self.special("eos_token")
        named = self.rust.token_to_id(token) if token else None
        return tuple(dict.fromkeys([*ids, *([named] if named is not None else [])]))

    @property
    def bos_id(self) -> int | None:
        token = self.special("bos_token")
        return self.rust.token_to_id(token) if token else None

    def special(self, name: str) -> str | None:
        """'bos_token' -> '<s>'; the entry may be text or an object with content."""
        entry = self.config.get(name) or self._json("special_tokens_map.json").get(name)
        return entry.get("content") if isinstance(entry, Mapping) else entry

    @cached_property
    def chat_template(self) -> str | None:
        """Jinja text; the named one 'default' where there are several."""
        if "chat_template.jinja" in self.files.extra:
            return self.files.extra["chat_template.jinja"].decode()
        template = self.config.get("chat_template")
        if isinstance(template, list):
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        return template

    def ask(self, message: str) -> list[int]:
        """Token ids of a chat's first message."""
        return self.encode(self.apply_chat([{"role": "user", "content": message}]), specials=False)

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Messages {'role', 'content'} -> prompt text; encode it with specials=False."""
        if self.chat_template is None:
            raise EffcError(f"{self.where}: no chat template in tokenizer_config.json, want plain text")
        names = {name: self.special(name) or "" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            template = _environment().from_string(self.chat_template)
            return template.render(
                messages=list(messages), add_generation_prompt=generation_prompt, **names, **variables
            )
        except jinja2.TemplateError as error:
            raise EffcError(f"{self.where}: chat template: {error}") from None

    def _json(self, name: str) -> Mapping[str, Any]:
        data = self.files.extra.get(name)
        try:
            return json.loads(data) if data else {}
        except ValueError as error:
            raise EffcError(f"{self.where}: {name} is not JSON: {error}") from None


class Stream:
    """push(id) -> text that is certain now; a character split over tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.ids = list(prompt[-8:])  # enough context for a decoder to know that no text starts here
        self.done = len(self.ids)  # ids whose text has been given out
        self.start = 0  # ids before this no longer matter to what follows

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = self._new()
        return "" if text.endswith(BROKEN) else self._give(text)

    def extend(self, tokens: Iterable[int]) -> str:
        return "".join([self.push(token) for token in tokens])

    def flush(self) -> str:
        """What is left at the end, broken characters included."""
        return self._give(self._new())

    def _new(self) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.done])
        return self.tokenizer.decode(self.ids[self.start :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self.start, self.done = self.done, len(self.ids)
        return text


def _environment() -> jinja2.Environment:
    """Templates come from strangers: sandboxed, with the functions transformers gives them."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = to_json
    return environment
