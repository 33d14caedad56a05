"""Families named without code: Hugging Face config -> Flax module, and where each leaf is stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import linen

from effc.errors import EffcError, nearest
from effc.frontend.checkpoints.tensors import Ref
from effc.models import Gemma, GemmaConfig, Gpt2, Gpt2Config, Llama, LlamaConfig, Rope, rope
from effc.models.attention import ACTIVATIONS


@dataclass(frozen=True)
class Config:
    """config.json, or GGUF metadata under the same keys."""

    values: Mapping[str, Any]
    where: str
    dtype: np.dtype

    def need(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise EffcError(f"{self.where}: no '{key}'{nearest(key, self.values)}")
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, *fine: Any) -> None:
        """An option that would change the result and that the Flax definition does not have."""
        if self.values.get(key) not in (None, False, *fine):
            raise EffcError(
                f"{self.where}: {key}={self.values[key]} is not supported, "
                f"want {' or '.join(map(str, fine or (False,)))}"
            )

    def act(self, *keys: str, default: str) -> str:
        name = next((self.values[key] for key in keys if self.values.get(key)), default)
        if name not in ACTIVATIONS:
            raise EffcError(
                f"{self.where}: no activation '{name}', want {', '.join(ACTIVATIONS)}{nearest(name, ACTIVATIONS)}"
            )
        return name


@dataclass(frozen=True)
class Family:
    """names: module path -> tensor name without its last part; transposed: kernels lie [out,in] on disk."""

    build: Callable[[Config], linen.Module]
    names: Mapping[str, str]
    prefix: str
    transposed: bool = True


def ropes(
    config: Config,
    head_dim: int,
    *,
    kind: str = "full_attention",
    theta: float = 10000.0,
    scaled: bool = True,
) -> Rope:
    """One layer kind's rotation; rope_theta and rope_scaling, or transformers 5's rope_parameters."""
    parameters = config.get("rope_parameters", {})
    parameters = parameters.get(kind, parameters)
    theta = parameters.get("rope_theta", theta)
    scaling = {**config.get("rope_scaling", {}), **parameters} if scaled else {}
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise EffcError(f"{config.where}: partial_rotary_factor is not supported, want 1.0")
    return scaled_rope(config, rope.plain(head_dim, theta), theta, scaling)


def scaled_rope(config: Config, base: Rope, theta: float, scaling: Mapping[str, Any]) -> Rope:
    name = scaling.get("rope_type", scaling.get("type", "default"))
    original = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    if name in ("default", None):
        return base
    if name == "factors":
        return rope.divided(base, np.asarray(scaling["factors"], np.float32))
    if name == "linear":
        return rope.linear(base, scaling["factor"])
    if name == "llama3":
        return rope.llama3(base, scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"], original)
    if name == "yarn" and not scaling.get("mscale"):
        options = {key: scaling[key] for key in ("beta_fast", "beta_slow", "truncate") if scaling.get(key) is not None}
        return rope.yarn(base, theta, scaling["factor"], original, scale=scaling.get("attention_factor"), **options)
    known = ("linear", "llama3", "yarn")
    raise EffcError(
        f"{config.where}: rope scaling '{name}' is not supported, want {', '.join(known)}{nearest(str(name), known)}"
    )


def windows(config: Config, layers: int, sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer: layer_types when the config lists them, else the family's rule."""
    size = config.get("sliding_window")
    kinds = config.get("layer_types") or [
        "sliding_attention" if sliding(i) else "full_attention" for i in range(layers)
    ]
    if len(kinds) != layers:
        raise EffcError(f"{config.where}: layer_types has {len(kinds)} entries, want {layers}, one a layer")
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise EffcError(
            f"{config.where}: layer type '{min(unknown)}' is not supported, want full_attention or sliding_attention"
        )
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def llama(config: Config, **options: Any) -> Llama:
    layers, heads, width = (config.need(k) for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    head_dim = config.get("head_dim", width // heads)
    rotation = ropes(config, head_dim, theta=config.get("rope_theta", 10000.0))
    defaults = {
        "windows": (None,) * layers,
        "ropes": (rotation,) * layers,
        "qkv_bias": config.get("attention_bias", False),
        "out_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "tied": config.get("tie_word_embeddings", False),
    }
    return Llama(
        LlamaConfig(
            vocab=config.need("vocab_size"),
            width=width,
            hidden=config.need("intermediate_size"),
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head_dim=head_dim,
            eps=config.get("rms_norm_eps", 1e-6),
            act=config.act("hidden_act", default="silu"),
            dtype=config.dtype,
            **(defaults | options),
        )
    )


def mistral(config: Config) -> Llama:
    return llama(
        config,
        windows=windows(config, config.need("num_hidden_layers"), lambda i: True),
        qkv_bias=False,
        out_bias=False,
    )


def qwen2(config: Config) -> Llama:
    return llama(config, windows=_late_windows(config), qkv_bias=True, out_bias=False)


def qwen3(config: Config) -> Llama:
    return llama(config, windows=_late_windows(config), qk_norm=True)


def smollm3(config: Config) -> Llama:
    layers, every = config.need("num_hidden_layers"), config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(layers)]
    head_dim = config.get("head_dim", config.need("hidden_size") // config.need("num_attention_heads"))
    rotation = ropes(config, head_dim, theta=config.get("rope_theta", 2000000.0))
    tied = config.get("tie_word_embeddings", True)
    return llama(
        config,
        windows=_late_windows(config),
        ropes=tuple(rotation if r else None for r in rotated),
        tied=tied,
    )


def _late_windows(config: Config) -> tuple[int | None, ...]:
    """Qwen: the window, if switched on at all, begins at layer max_window_layers."""
    layers = config.need("num_hidden_layers")
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    return windows(config, layers, lambda i: i >= config.get("max_window_layers", 28))


def gemma(config: Config, **options: Any) -> Gemma:
    layers, head_dim = config.need("num_hidden_layers"), config.get("head_dim", 256)
    config.refuse("use_bidirectional_attention")
    rotation = ropes(config, head_dim, theta=config.get("rope_theta", 10000.0))
    defaults = {"windows": (None,) * layers, "ropes": (rotation,) * layers, "scale": head_dim**-0.5}
    return Gemma(
        GemmaConfig(
            vocab=config.need("vocab_size"),
            width=config.need("hidden_size"),
            hidden=config.need("intermediate_size"),
            heads=config.need("num_attention_heads"),
            kv_heads=config.need("num_key_value_heads"),
            head_dim=head_dim,
            eps=config.get("rms_norm_eps", 1e-6),
            act=config.act("hidden_activation", default="gelu_pytorch_tanh"),
            bias=config.get("attention_bias", False),
            tied=config.get("tie_word_embeddings", True),
            dtype=config.dtype,
            **(defaults | options),
        )
    )


def gemma2(config: Config) -> Gemma:
    return gemma(
        config,
        windows=windows(config, config.need("num_hidden_layers"), lambda i: i % 2 == 0),
        scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        post_norms=True,
        score_cap=config.values.get("attn_logit_softcapping", 50.0),
        logit_cap=config.values.get("final_logit_softcapping", 30.0),
    )


def gemma3(config: Config) -> Gemma:
    every, head_dim = config.get("sliding_window_pattern", 6), config.get("head_dim", 256)
    spans = windows(config, config.need("num_hidden_layers"), lambda i: (i + 1) % every != 0)
    far = ropes(config, head_dim, theta=config.get("rope_theta", 1000000.0))
    near = ropes(
        config,
        head_dim,
        kind="sliding_attention",
        theta=config.get("rope_local_base_freq", 10000.0),
        scaled=False,
    )
    return gemma(
        config,
        windows=spans,
        ropes=tuple(far if span is None else near for span in spans),
        scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        post_norms=True,
        qk_norm=True,
        score_cap=config.get("attn_logit_softcapping"),
        logit_cap=config.get("final_logit_softcapping"),
    )


def gpt2(config: Config) -> Gpt2:
    config.refuse("scale_attn_by_inverse_layer_idx")
    config.refuse("scale_attn_weights", True)
    width = config.need("n_embd")
    return Gpt2(
        Gpt2Config(
            vocab=config.need("vocab_size"),
            positions=config.need("n_positions"),
            width=width,
            hidden=config.get("n_inner", 4 * width),
            heads=config.need("n_head"),
            layers=config.need("n_layer"),
            eps=config.get("layer_norm_epsilon", 1e-5),
            act=config.act("activation_function", default="gelu_new"),
            tied=config.get("tie_word_embeddings", True),
            dtype=config.dtype,
        )
    )


LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "layers_{i}/norm1": "model.layers.{i}.input_layernorm",
    **{f"layers_{{i}}/attn/{n}": f"model.layers.{{i}}.self_attn.{n}_proj" for n in "qkv"},
    "layers_{i}/attn/q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers_{i}/attn/k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers_{i}/attn/out": "model.layers.{i}.self_attn.o_proj",
    "layers_{i}/norm2": "model.layers.{i}.post_attention_layernorm",
    **{f"layers_{{i}}/mlp/{n}": f"model.layers.{{i}}.mlp.{n}_proj" for n in ("gate", "up", "down")},
    "norm": "model.norm",
    "head": "lm_head",
}
GEMMA2_NAMES = LLAMA_NAMES | {
    "layers_{i}/post1": "model.layers.{i}.post_attention_layernorm",
    "layers_{i}/norm2": "model.layers.{i}.pre_feedforward_layernorm",
    "layers_{i}/post2": "model.layers.{i}.post_feedforward_layernorm",
}
GPT2_NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "layers_{i}/norm1": "transformer.h.{i}.ln_1",
    "layers_{i}/qkv": "transformer.h.{i}.attn.c_attn",
    "layers_{i}/out": "transformer.h.{i}.attn.c_proj",
    "layers_{i}/norm2": "transformer.h.{i}.ln_2",
    "layers_{i}/up": "transformer.h.{i}.mlp.c_fc",
    "layers_{i}/down": "transformer.h.{i}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(llama, LLAMA_NAMES, "model."),
    "mistral": Family(mistral, LLAMA_NAMES, "model."),
    "qwen2": Family(qwen2, LLAMA_NAMES, "model."),
    "qwen3": Family(qwen3, LLAMA_NAMES, "model."),
    "smollm3": Family(smollm3, LLAMA_NAMES, "model."),
    "gemma": Family(gemma, LLAMA_NAMES, "model."),
    "gemma2": Family(gemma2, GEMMA2_NAMES, "model."),
    "gemma3_text": Family(gemma3, GEMMA2_NAMES, "model."),
    "gpt2": Family(gpt2, GPT2_NAMES, "transformer.", transposed=False),
}


def family_of(name: str, where: str, known: Iterable[str] = tuple(FAMILIES)) -> str:
    if name not in known:
        raise EffcError(
            f"{where}: no family '{name}', want {', '.join(known)}, "
            f"or your own code with --module{nearest(name, known)}"
        )
    return name


def refs_of(paths: Iterable[str], names: Mapping[str, str], transposed: bool) -> dict[str, Ref]:
    """'layers_3/attn/q/kernel' -> 'model.layers.3.self_attn.q_proj.weight', transposed."""
    refs = {}
    for path in paths:
        module, leaf = path.rsplit("/", 1)
        layer = re.search(r"layers_(\d+)", module)
        stem = names[re.sub(r"layers_\d+", "layers_{i}", module)]
        stem = stem.format(i=layer[1]) if layer else stem
        # An untied head is a Linear in every family, also where the other kernels are stored [in,out].
        turned = leaf == "kernel" and (transposed or module == "head")
        refs[path] = Ref(f"{stem}.{'bias' if leaf == 'bias' else 'weight'}", transpose=turned)
    return refs
