"""Writes families.npz: run where torch and transformers are (the `oracle` extra)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers as tf

HERE = Path(__file__).parent
BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_positions": 32, "n_layer": 2}
GEMMA = {**BASE, "head_dim": 8}

CASES = {
    "llama": tf.LlamaConfig(**BASE),
    "llama_biased": tf.LlamaConfig(
        **BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=8, rope_theta=5e5
    ),
    "llama_llama3": tf.LlamaConfig(**BASE, rope_scaling=LLAMA3, rope_theta=5e5),
    "llama_linear": tf.LlamaConfig(**BASE, rope_scaling=LINEAR),
    "llama_yarn": tf.LlamaConfig(**BASE, rope_scaling=YARN),
    "mistral": tf.MistralConfig(**BASE, sliding_window=5),
    "mistral_full": tf.MistralConfig(**BASE, sliding_window=None, head_dim=8),
    "qwen2": tf.Qwen2Config(**BASE),
    "qwen2_window": tf.Qwen2Config(
        **BASE, use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": tf.Qwen3Config(**BASE, head_dim=8),
    "smollm3": tf.SmolLM3Config(**{**BASE, "num_hidden_layers": 5}, pad_token_id=0),
    "gemma": tf.GemmaConfig(**GEMMA),
    "gemma2": tf.Gemma2Config(
        **GEMMA,
        sliding_window=5,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": tf.Gemma3TextConfig(
        **{**GEMMA, "num_hidden_layers": 7}, sliding_window=5, query_pre_attn_scalar=8, rope_scaling=LINEAR
    ),
    "gpt2": tf.GPT2Config(**GPT2),
    "gpt2_untied": tf.GPT2Config(**GPT2, n_inner=20, activation_function="gelu_new", tie_word_embeddings=False),
}
DERIVED = ("transformers_version", "dtype", "architectures")


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As in test_models.py."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return 0.3 * x + (0 if name.endswith("bias") else 1)
    return x * np.float32(0.5 if "embed" in name or "wte" in name else 1.3 / shape[-1] ** 0.5)


def main() -> None:
    out = {}
    for name, config in CASES.items():
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        model.load_state_dict({n: torch.tensor(weight(n, s)) for n, s in shapes.items()}, strict=False)
        tokens = np.random.default_rng(0).integers(0, 40, (2, 14)).astype(np.int32)
        with torch.no_grad():
            logits = model(torch.tensor(tokens).long()).logits.numpy()
        kept = {k: v for k, v in json.loads(config.to_json_string(use_diff=True)).items() if k not in DERIVED}
        out |= {f"{name}/config": np.array(json.dumps(kept)), f"{name}/shapes": np.array(json.dumps(shapes))}
        out |= {f"{name}/tokens": tokens, f"{name}/logits": logits.astype(np.float32)}
        print(name, logits.std())
    np.savez_compressed(HERE / "families.npz", **out)


main()
