"""Hugging Face folders: config.json, one or many safetensors (or flax_model.msgpack), tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effc.errors import EffcError
from effc.frontend import adapt
from effc.frontend.checkpoints.families import FAMILIES, Config, family_of, refs_of
from effc.frontend.checkpoints.safetensor_files import SafetensorFiles
from effc.frontend.checkpoints.tensors import Tensors, match
from effc.frontend.source import Source, TokenizerFiles, flatten

# Buffers that older checkpoints stored too; a tied head is the embedding, as transformers loads it.
BUFFERS = r"rotary_emb\.inv_freq$|(^|\.)attn\.(bias|masked_bias)$"
TIED_HEAD = r"|^lm_head\.weight$"

EXTRAS = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "tf_model.h5")


def open_hf(folder: Path, dtype: np.dtype) -> Source:
    return source_of(folder, safetensors_in(folder), "safetensors", dtype)


def source_of(folder: Path, tensors: Tensors, kind: str, dtype: np.dtype) -> Source:
    """Any Tensors under Hugging Face's names and layouts, with folder/config.json."""
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    model_type = family_of(str(values.get("model_type")), where)
    for key in ("quantization_config", "quantization"):
        refuse_quantized(values.get(key), where, key)
    family = FAMILIES[model_type]
    module = family.build(Config(values, where, dtype))
    forward, spec = adapt.from_linen(module, where=where)
    specs = flatten(spec)
    bare = not any(name.startswith(family.prefix) for name in tensors.names())
    names = {path: name.removeprefix(family.prefix) if bare else name for path, name in family.names.items()}
    refs = refs_of(specs, names, family.transposed)
    weights = match(tensors, refs, specs, BUFFERS + (TIED_HEAD if module.config.tied else ""))
    return Source(
        name=folder.resolve().name,
        forward=forward,
        spec=spec,
        weights=weights,
        tokenizer=tokenizer_in(folder),
        context=values.get("max_position_embeddings", values.get("n_positions")),
        meta={
            "format": kind,
            "family": model_type,
            "stored": kinds_of(tensors),
            "file": folder.resolve().name,
            "dtype": dtype.name,
            "vocab": module.config.vocab,
        },
    )


def safetensors_in(folder: Path) -> SafetensorFiles:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return SafetensorFiles([single], str(single))
    if index.exists():
        files = sorted({folder / file for file in read_json(index)["weight_map"].values()})
        lost = [file.name for file in files if not file.exists()]
        if lost:
            raise EffcError(f"{index}: {len(lost)} of {len(files)} shards are not there: {', '.join(lost[:5])}")
        return SafetensorFiles(files, str(folder))
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return SafetensorFiles(files, str(folder))
    pickles = [name for name in PICKLES if (folder / name).exists()]
    hint = f"; {pickles[0]} is not read (pickles can run code), save it as safetensors" if pickles else ""
    raise EffcError(f"{folder}: no weights, want model.safetensors or its shards{hint}")


def tokenizer_in(folder: Path) -> TokenizerFiles | None:
    """tokenizer.json and the files that say which tokens end a text and how chats are laid out."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    extra = {name: (folder / name).read_bytes() for name in EXTRAS if (folder / name).exists()}
    if "generation_config.json" not in extra and (folder / "config.json").exists():
        ids = {k: v for k, v in read_json(folder / "config.json").items() if k in ("eos_token_id", "bos_token_id")}
        extra["generation_config.json"] = json.dumps(ids).encode()
    return TokenizerFiles(file.read_bytes(), extra)


def refuse_quantized(quantization: Mapping[str, Any] | None, where: str, key: str) -> None:
    """Bytes that mean something else than they look like are refused by the name of what made them."""
    if not quantization:
        return
    method = quantization.get("quant_method") or quantization.get("mode") or f"{quantization.get('bits', '?')}-bit"
    detail = ", ".join(f"{k}={quantization[k]}" for k in ("format", "bits", "group_size") if k in quantization)
    raise EffcError(
        f"{where}: {key} says the weights are quantized with {method}{f' ({detail})' if detail else ''}, "
        "want plain floats (or GGUF, which is read): give the checkpoint it was made from"
    )


def kinds_of(tensors: Tensors) -> str:
    """'BF16 x291' or 'Q4_1 x210, F32 x61, Q8_0 x1'."""
    kinds = [tensors.kind(name) for name in tensors.names()]
    return ", ".join(f"{kind} x{kinds.count(kind)}" for kind in sorted(set(kinds), key=lambda k: -kinds.count(k)))


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise EffcError(f"{file}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EffcError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise EffcError(f"{file}: holds a {type(values).__name__}, want an object")
    return values
