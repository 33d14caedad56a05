"""Language models that nobody here wrote, tiny, random weights: one function a model, giving an effc Source."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import effc
from effc.frontend.source import Source, flatten

VOCAB, CONTEXT = 97, 64
WIDTH, HIDDEN, HEADS, HEAD = 64, 96, 4, 16  # keys of two heads are just wide enough for quant8 to take them


@dataclass(frozen=True)
class Model:
    """One of the models.

    routing: kinds of ops that its mixture of experts leaves as they are; kept: parameters of linears that
    quant8 leaves on purpose; failing: why a check, by its name, is known to fail; unit: layers after which
    they repeat; heads: attentions a layer.
    """

    source: str
    build: Callable[[], Source]
    layers: int
    routing: frozenset[str] = frozenset()
    kept: str = ""
    failing: tuple[tuple[str, str], ...] = ()
    unit: int = 1
    heads: int = 1


def moved(params: Any) -> Any:
    """Parameters away from the zeros and ones that initialisers leave."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32), params)


# -- transformers ---------------------------------------------------------------------------------------
def linen(name: str, config: str, *, positions: bool = True, **settings: Any) -> Callable[[], Source]:
    """A Flax class of `transformers`; its attention mask, and most times its positions, are required."""

    def build() -> Source:
        transformers = pytest.importorskip("transformers", reason="needs transformers<5: its Flax classes")
        if getattr(transformers, f"Flax{name}", None) is None:
            pytest.skip("this transformers has no Flax classes")
        made = getattr(transformers, config)(vocab_size=VOCAB, **settings)
        model = getattr(transformers, f"Flax{name}")(made, seed=0, input_shape=(1, 8))

        def forward(params: Any, tokens: jax.Array) -> jax.Array:
            where = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
            rest = (where,) if positions else ()
            return model.module.apply({"params": params}, tokens, jnp.ones_like(tokens), *rest).logits

        return effc.load(forward, moved(model.params), name=name, context=CONTEXT)

    return build


LLAMA: dict[str, Any] = {
    "num_hidden_layers": 3, "num_attention_heads": HEADS, "num_key_value_heads": 2, "hidden_size": WIDTH,
    "intermediate_size": HIDDEN, "max_position_embeddings": CONTEXT,
}  # fmt: skip
GPT2: dict[str, Any] = {"n_layer": 3, "n_head": HEADS, "n_embd": WIDTH, "n_positions": CONTEXT}
OPT: dict[str, Any] = {
    "num_hidden_layers": 3, "num_attention_heads": HEADS, "hidden_size": WIDTH, "ffn_dim": HIDDEN,
    "max_position_embeddings": CONTEXT, "word_embed_proj_dim": WIDTH,
}  # fmt: skip
GPT_NEO: dict[str, Any] = {
    "num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": HEADS, "hidden_size": WIDTH,
    "intermediate_size": HIDDEN, "max_position_embeddings": CONTEXT, "window_size": 7,
}  # fmt: skip
XGLM: dict[str, Any] = {
    "num_layers": 3, "attention_heads": HEADS, "d_model": WIDTH, "ffn_dim": HIDDEN,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
GEMMA: dict[str, Any] = LLAMA | {"num_key_value_heads": 1, "head_dim": 32}


# -- packages of which only the models are wanted ---------------------------------------------------------
def stub(*names: str) -> None:
    """Make packages importable without running them: they import trainers that the models do not need."""
    for name in names:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            pytest.skip(f"needs {name} (pip install --no-deps)")
        package = types.ModuleType(name)
        package.__spec__ = spec
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = package


Call = Callable[[Any, jax.Array], jax.Array]


def from_nnx(name: str, model: nnx.Module, call: Call) -> Source:
    """`call(model, tokens)` as a function of the model's parameters."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    paths = {"/".join(map(str, path)): path for path, _ in params.flat_state()}

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        state = nnx.State.from_flat_path({paths[name]: nnx.Param(x) for name, x in flatten(params).items()})
        return call(nnx.merge(graph, state, rest), tokens)

    arrays = {"/".join(map(str, path)): variable.get_value() for path, variable in params.flat_state()}
    return effc.load(forward, moved(arrays), name=name, context=CONTEXT)


def masked(model: Any, tokens: jax.Array) -> jax.Array:
    """As google-tunix calls its models: positions and a causal mask are required."""
    b, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool))[None], (b, t, t))
    return model(tokens, positions, None, mask)[0]


def tunix(family: str, name: str, settings: Callable[[Any], dict[str, Any]]) -> Callable[[], Source]:
    """A model of google-tunix; settings(its module) are added to what all of them take."""

    def build() -> Source:
        stub("tunix")
        module = importlib.import_module(f"tunix.models.{family}.model")
        base = {
            "num_layers": 3, "embed_dim": WIDTH, "num_heads": HEADS, "head_dim": HEAD, "num_kv_heads": 2,
            "hidden_dim": HIDDEN,
        }  # fmt: skip
        config = module.ModelConfig(**base | settings(module))
        return from_nnx(name, getattr(module, name)(config, rngs=nnx.Rngs(0)), masked)

    return build


ROTARY = {"vocab_size": VOCAB, "rope_theta": 10000, "norm_eps": 1e-6}


def gemma2(module: Any) -> dict[str, Any]:
    """Soft caps, norms on both sides, every other layer with a window."""
    kinds = module.AttentionType
    return {
        "num_embed": VOCAB, "num_layers": 4, "attention_types": [kinds.LOCAL_SLIDING, kinds.GLOBAL] * 2,
        "sliding_window_size": 6, "attn_logits_soft_cap": 50.0, "final_logit_softcap": 30.0,
        "use_post_attn_norm": True, "use_post_ffw_norm": True,
    }  # fmt: skip


def gemma3(module: Any) -> dict[str, Any]:
    """Twice five layers with a window and one without, then one more; in f32."""
    return {"num_embed": VOCAB, "num_layers": 13, "sliding_window_size": 6, "param_dtype": jnp.float32}


def dantinox(**settings: Any) -> Callable[[], Source]:
    """A model of dantinox."""

    def build() -> Source:
        pytest.importorskip("yaml", reason="dantinox needs pyyaml")
        stub("dantinox", "dantinox.core")
        base = {
            "dim": WIDTH, "n_heads": HEADS, "head_size": HEAD, "num_blocks": 3, "vocab_size": VOCAB,
            "max_context": CONTEXT, "expansion": 2,
        }  # fmt: skip
        config = importlib.import_module("dantinox.core.config").ModelConfig(**base | settings)
        model = importlib.import_module("dantinox.core.model").Transformer(config, rngs=nnx.Rngs(0))
        return from_nnx("dantinox", model, lambda model, tokens: model(tokens, deterministic=True).logits)

    return build


EXPERTS = frozenset({"lax.exp", "lax.dot_general"})
"""Softmax over experts; the sum of what they gave, weighted."""

MODELS = {
    "gpt2": Model("transformers", linen("GPT2LMHeadModel", "GPT2Config", **GPT2), 3),
    "llama": Model("transformers", linen("LlamaForCausalLM", "LlamaConfig", **LLAMA), 3),
    "mistral": Model("transformers", linen("MistralForCausalLM", "MistralConfig", sliding_window=7, **LLAMA), 3),
    "gemma": Model("transformers", linen("GemmaForCausalLM", "GemmaConfig", **GEMMA), 3),
    "opt": Model("transformers", linen("OPTForCausalLM", "OPTConfig", **OPT), 3),
    "gpt-neo": Model("transformers", linen("GPTNeoForCausalLM", "GPTNeoConfig", **GPT_NEO), 4, unit=2),
    "gpt-j": Model("transformers", linen("GPTJForCausalLM", "GPTJConfig", rotary_dim=8, **GPT2), 3),
    "bloom": Model(
        "transformers",
        linen("BloomForCausalLM", "BloomConfig", positions=False, n_layer=3, n_head=HEADS, hidden_size=WIDTH),
        3,
    ),
    "xglm": Model("transformers", linen("XGLMForCausalLM", "XGLMConfig", **XGLM), 3),
    "llama3": Model("google-tunix", tunix("llama3", "Llama3", lambda m: ROTARY), 3),
    "llama3-remat": Model(
        "google-tunix", tunix("llama3", "Llama3", lambda m: ROTARY | {"remat_config": m.RematConfig.BLOCK}), 3
    ),
    "qwen2": Model("google-tunix", tunix("qwen2", "Qwen2", lambda m: ROTARY), 3),
    "qwen3": Model("google-tunix", tunix("qwen3", "Qwen3", lambda m: ROTARY | {"use_tied_embedding": True}), 3),
    "qwen3-moe": Model(
        "google-tunix",
        tunix("qwen3", "Qwen3", lambda m: ROTARY | {"num_experts": 4, "num_experts_per_tok": 2}),
        3,
        routing=EXPERTS,
        kept="*.router.*",
    ),
    "gemma2": Model("google-tunix", tunix("gemma", "Gemma", gemma2), 4, unit=2),
    "gemma3": Model("google-tunix", tunix("gemma3", "Gemma3", gemma3), 13, unit=6),
    "dantinox-gqa": Model("dantinox", dantinox(attention="gqa", kv_heads=2), 3),
    "dantinox-learned": Model(
        "dantinox", dantinox(norm="layernorm", pos_encoding="learned", use_swiglu=False, weight_tying=False), 3
    ),
    "dantinox-sinusoid": Model("dantinox", dantinox(attention="gqa", kv_heads=2, pos_encoding="absolute"), 3),
    "dantinox-mla": Model(
        "dantinox",
        dantinox(attention="mla", n_heads=2, head_size=32, down_dim_q=32, down_dim_kv=32, rope_dim=32),
        3,
    ),
}
SAMPLE = ("gpt2", "qwen3")
