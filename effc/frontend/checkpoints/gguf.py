"""GGUF files: metadata as a Hugging Face config, tensors dequantized one by one by the gguf library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from effc.errors import EffcError
from effc.frontend import adapt
from effc.frontend.checkpoints.families import FAMILIES, Config, family_of, refs_of
from effc.frontend.checkpoints.gguf_header import Place, read_header
from effc.frontend.checkpoints.gguf_tokenizer import tokenizer_files
from effc.frontend.checkpoints.hf import kinds_of
from effc.frontend.checkpoints.tensors import Ref, match
from effc.frontend.source import Source, flatten

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
}

CONFIG_KEYS = {
    "num_hidden_layers": "block_count",
    "n_layer": "block_count",
    "hidden_size": "embedding_length",
    "n_embd": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "n_inner": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "n_head": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "max_position_embeddings": "context_length",
    "n_positions": "context_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

NAMES = {
    "embed": "token_embd",
    "positions": "position_embd",
    "layers_{i}/norm1": "blk.{i}.attn_norm",
    **{f"layers_{{i}}/attn/{n}": f"blk.{{i}}.attn_{n}" for n in ("q", "k", "v", "q_norm", "k_norm")},
    "layers_{i}/attn/out": "blk.{i}.attn_output",
    "layers_{i}/post1": "blk.{i}.post_attention_norm",
    "layers_{i}/norm2": "blk.{i}.ffn_norm",
    "layers_{i}/post2": "blk.{i}.post_ffw_norm",
    **{f"layers_{{i}}/mlp/{n}": f"blk.{{i}}.ffn_{n}" for n in ("gate", "up", "down")},
    "layers_{i}/qkv": "blk.{i}.attn_qkv",
    "layers_{i}/out": "blk.{i}.attn_output",
    "layers_{i}/up": "blk.{i}.ffn_up",
    "layers_{i}/down": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}

CHUNK = 1 << 20  # values decoded at once
PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
PERMUTED = ("llama", "smollm3")  # architectures whose converter interleaves the two rope halves of q and k


class GgufTensors:
    """The tensors of one GGUF file."""

    kinds = tuple(kind.name for kind in gguf.GGMLQuantizationType)

    def __init__(self, file: Path, places: Mapping[str, Place]):
        self.where = str(file)
        self.places = places

    def names(self) -> Iterable[str]:
        return self.places

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape

    def kind(self, name: str) -> str:
        return self.places[name].kind.name

    def read(self, name: str) -> np.ndarray:
        """float32 (or the stored float type)."""
        place = self.places[name]
        raw = np.fromfile(self.where, np.uint8, place.size, offset=place.offset)
        if place.kind.name in PLAIN:
            return raw.view(PLAIN[place.kind.name]).reshape(place.shape)
        try:
            return _decoded(raw.reshape(*place.shape[:-1], -1), place)
        except NotImplementedError:
            raise EffcError(
                f"{self.where}: tensor '{name}' is {place.kind.name}, which the gguf library cannot decode"
            ) from None


def _decoded(raw: np.ndarray, place: Place) -> np.ndarray:
    """A few rows at a time: the library's temporaries are several times the size of what it decodes."""
    if len(place.shape) == 1:
        return gguf.dequantize(raw, place.kind)
    out = np.empty(place.shape, np.float32)
    step = max(1, CHUNK // place.shape[-1])
    for row in range(0, len(out), step):
        out[row : row + step] = gguf.dequantize(raw[row : row + step], place.kind)
    return out


def open_gguf(file: Path, dtype: np.dtype) -> Source:
    header = read_header(file)
    fields, tensors = header.fields, GgufTensors(file, header.tensors)
    arch = family_of(str(fields.get("general.architecture")), str(file), tuple(ARCHITECTURES))
    family = FAMILIES[ARCHITECTURES[arch]]
    config = Config(config_of(fields, arch, tensors), str(file), dtype)
    module = family.build(config)
    forward, spec = adapt.from_linen(module, where=str(file))
    specs = flatten(spec)
    refs = {path: fixed(path, ref, arch, config) for path, ref in refs_of(specs, NAMES, transposed=True).items()}
    return Source(
        name=file.stem,
        forward=forward,
        spec=spec,
        weights=match(tensors, refs, specs, r"^rope_freqs\.weight$"),
        tokenizer=tokenizer_files(fields, str(file)),
        context=fields.get(f"{arch}.context_length"),
        meta={
            "format": "gguf",
            "family": ARCHITECTURES[arch],
            "stored": kinds_of(tensors),
            "file": file.name,
            "dtype": dtype.name,
            "vocab": module.config.vocab,
        },
    )


def config_of(fields: Mapping[str, Any], arch: str, tensors: GgufTensors) -> dict[str, Any]:
    """Metadata under Hugging Face's keys; biases and tying, left out, are seen in the tensors."""
    config = {key: fields.get(f"{arch}.{name}") for key, name in CONFIG_KEYS.items()}
    names = set(tensors.names())
    refuse_unlike(fields, arch, config, tensors.where)
    config["vocab_size"] = tensors.shape("token_embd.weight")[0] if "token_embd.weight" in names else None
    config["tie_word_embeddings"] = "output.weight" not in names
    config["attention_bias"] = "blk.0.attn_q.bias" in names
    config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    config["rope_scaling"] = rope_scaling(fields, arch, tensors)
    if arch in ("gemma2", "gemma3"):
        config["query_pre_attn_scalar"] = gemma_scale(config)
    return config


def rope_scaling(fields: Mapping[str, Any], arch: str, tensors: GgufTensors) -> dict[str, Any] | None:
    """Llama 3's scaling is stored as one divisor a frequency, others as type and factor."""
    if "rope_freqs.weight" in set(tensors.names()):
        return {"rope_type": "factors", "factors": tensors.read("rope_freqs.weight")}
    kind = fields.get(f"{arch}.rope.scaling.type")
    if kind in (None, "none"):
        return None
    return {
        "rope_type": kind,
        "factor": fields.get(f"{arch}.rope.scaling.factor"),
        "original_max_position_embeddings": fields.get(f"{arch}.rope.scaling.original_context_length"),
    }


def gemma_scale(config: Mapping[str, Any]) -> int:
    """query_pre_attn_scalar is not in GGUF: 27B models (46, 62 layers) use width / heads, others head_dim."""
    if config["num_hidden_layers"] in (46, 62):
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def refuse_unlike(fields: Mapping[str, Any], arch: str, config: Mapping[str, Any], where: str) -> None:
    if fields.get("split.count", 1) > 1:
        raise EffcError(
            f"{where}: one of {fields['split.count']} parts, want a single file (llama-gguf-split --merge joins them)"
        )
    experts = fields.get(f"{arch}.expert_count")
    if experts:
        raise EffcError(f"{where}: {experts} experts a layer, want a dense model")
    lists = [key for key, value in config.items() if isinstance(value, list)]
    if lists:
        raise EffcError(f"{where}: {CONFIG_KEYS[lists[0]]} differs between layers, want one number")
    head_dim = config["head_dim"] or (config["hidden_size"] or 0) // (config["num_attention_heads"] or 1)
    rotated = fields.get(f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise EffcError(f"{where}: rope turns {rotated} of {head_dim} dimensions, want all")


def fixed(path: str, ref: Ref, arch: str, config: Config) -> Ref:
    """Undoes what the converter did: rope halves interleaved (Llama), one added to norms (Gemma)."""
    fix: Callable[[np.ndarray], np.ndarray] | None = None
    if arch in PERMUTED and "/attn/q/" in path:
        fix = unpermute(config.need("num_attention_heads"))
    elif arch in PERMUTED and "/attn/k/" in path:
        fix = unpermute(config.get("num_key_value_heads", config.need("num_attention_heads")))
    elif arch.startswith("gemma") and path.endswith("/scale"):
        fix = _minus_one
    return Ref(ref.tensor, ref.transpose, fix)


def unpermute(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows (head, frequency, half) -> (head, half, frequency)."""

    def fix(rows: np.ndarray) -> np.ndarray:
        split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
        return split.swapaxes(1, 2).reshape(rows.shape)

    return fix


def _minus_one(scale: np.ndarray) -> np.ndarray:
    return scale - np.float32(1)
