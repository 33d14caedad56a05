"""Bad input: one clear line each, with what was found, what is wanted, and the nearest name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from effc.errors import EffcError
from effc.frontend.checkpoints import open_checkpoint, save_checkpoint
from effc.frontend.tokenizer import Tokenizer as Text

CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    f"{LAYER}.input_layernorm.weight": (8,),
    f"{LAYER}.self_attn.q_proj.weight": (8, 8),
    f"{LAYER}.self_attn.k_proj.weight": (4, 8),
    f"{LAYER}.self_attn.v_proj.weight": (4, 8),
    f"{LAYER}.self_attn.o_proj.weight": (8, 8),
    f"{LAYER}.post_attention_layernorm.weight": (8,),
    f"{LAYER}.mlp.gate_proj.weight": (12, 8),
    f"{LAYER}.mlp.up_proj.weight": (12, 8),
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}
Arrays = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(config changes, change=function on the arrays) writes a tiny Hugging Face folder."""

    def write(change: Callable[[Arrays], Any] = lambda arrays: None, **config: Any) -> Path:
        arrays = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}
        change(arrays)
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
        save_file(arrays, tmp_path / "model.safetensors")
        return tmp_path

    return write


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(EffcError) as caught:
        open_checkpoint(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def cut(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


def write_tokenizer(folder: Path, tokens: int, specials: int = 0) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(tokens)}, unk_token="t0"))
    tokenizer.add_special_tokens([f"<s{i}>" for i in range(specials)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_tiny_folder_is_good(folder: Callable[..., Path]) -> None:
    source = open_checkpoint(folder())
    assert source.tokenizer is None
    assert source.context == 32
    assert source.weights.read("head/kernel").shape == (8, 16)


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.9])
def test_truncated_safetensors(folder: Callable[..., Path], keep: float) -> None:
    path = folder()
    cut(path / "model.safetensors", keep)
    refused(path, "model.safetensors: truncated", "bytes, want")


def test_safetensors_that_is_something_else(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json" + bytes(100))
    refused(path, "no safetensors header")


def test_safetensors_with_a_damaged_header(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"a": 3}')
    refused(path, "damaged safetensors header")


def test_wrong_shape(folder: Callable[..., Path]) -> None:
    path = folder(lambda a: a.update({"model.norm.weight": np.ones(9, np.float32)}))
    refused(path, "'model.norm.weight' is [9], want [8]", "norm/scale")


def test_wrong_shape_is_told_as_the_file_has_it(folder: Callable[..., Path]) -> None:
    path = folder(lambda a: a.update({f"{LAYER}.mlp.up_proj.weight": np.ones((8, 12), np.float32)}))
    refused(path, "is [8, 12], want [12, 8]")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named_when_read(folder: Callable[..., Path], value: float) -> None:
    name = f"{LAYER}.mlp.up_proj.weight"
    source = open_checkpoint(folder(lambda a: a[name].__setitem__((1, 2), value)))
    source.weights.read("layers_0/mlp/gate/kernel")
    with pytest.raises(EffcError, match=r"up_proj\.weight' has 1 values that are not finite"):
        source.weights.read("layers_0/mlp/up/kernel")


def test_float32_beyond_float16(folder: Callable[..., Path]) -> None:
    source = open_checkpoint(folder(lambda a: a["model.norm.weight"].fill(1e6)), dtype="float16")
    with pytest.raises(EffcError, match="want none as float16"):
        source.weights.read("norm/scale")


def test_missing_tokenizer(folder: Callable[..., Path]) -> None:
    source = open_checkpoint(folder())
    with pytest.raises(EffcError, match=r"no tokenizer\.json, want one beside the weights"):
        Text(source.tokenizer, "model")


def test_tokenizer_larger_than_the_embedding(folder: Callable[..., Path]) -> None:
    path = folder()
    write_tokenizer(path, 17)
    refused(path, "17 tokens, the model 16 embedding rows", "'t16'")


def test_tokenizer_smaller_than_the_embedding_is_fine(folder: Callable[..., Path]) -> None:
    path = folder()
    write_tokenizer(path, 12)
    assert Text(open_checkpoint(path).tokenizer).vocab_size == 12


def test_special_tokens_without_a_row_are_refused_in_use(folder: Callable[..., Path]) -> None:
    path = folder()
    write_tokenizer(path, 16, specials=1)
    text = Text(open_checkpoint(path).tokenizer)
    text.check_fits(16)
    assert text.encode("t3") == [3]
    with pytest.raises(EffcError, match="token '<s0>' is 16"):
        text.encode("<s0>")


def test_unknown_family_lists_the_known_and_the_nearest(folder: Callable[..., Path]) -> None:
    refused(folder(model_type="lama"), "no family 'lama'", "qwen2, qwen3", "did you mean 'llama'?", "--module")


def test_unmatched_tensors(folder: Callable[..., Path]) -> None:
    extra = {f"{LAYER}.adapter.{i}": np.ones(2, np.float32) for i in range(7)}
    refused(folder(lambda a: a.update(extra)), "7 tensors unmatched", "adapter.0", "adapter.4")


def test_buffers_of_old_checkpoints_are_let_be(folder: Callable[..., Path]) -> None:
    extra = {f"{LAYER}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    open_checkpoint(folder(lambda a: a.update(extra)))


def test_missing_tensors_and_the_nearest(folder: Callable[..., Path]) -> None:
    def misname(arrays: Arrays) -> None:
        arrays["model.norms.weight"] = arrays.pop("model.norm.weight")

    refused(
        folder(misname),
        "no tensor 'model.norm.weight'",
        "1 tensor missing",
        "did you mean 'model.norms.weight'?",
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, ("gptq", "bits=4")),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            ("pack-quantized",),
        ),
        ({"quantization": {"bits": 4, "group_size": 64}}, ("4-bit", "group_size=64")),
    ],
)
def test_quantized_input_is_refused_by_name(folder: Callable[..., Path], config: dict, words: tuple[str, ...]) -> None:
    refused(folder(**config), "quantized with", *words)


def test_quantized_tensors_without_a_word_in_the_config(folder: Callable[..., Path]) -> None:
    eight = np.ones((8, 8), np.int8)
    refused(
        folder(lambda a: a.update({f"{LAYER}.self_attn.q_proj.weight": eight})),
        "q_proj.weight' is I8, want F64, F32",
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            ("rope scaling 'dynamic'", "linear, llama3, yarn"),
        ),
        ({"hidden_act": "silo"}, ("no activation 'silo'", "did you mean 'silu'?")),
        ({"hidden_size": None}, ("config.json: no 'hidden_size'",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, ("has 2 entries, want 1",)),
        (
            {"model_type": "mistral", "layer_types": ["chunked_attention"]},
            ("layer type 'chunked_attention'",),
        ),
    ],
)
def test_config_that_means_another_model(folder: Callable[..., Path], config: dict, words: tuple[str, ...]) -> None:
    refused(folder(**config), *words)


def test_missing_shard(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": dict.fromkeys(SHAPES, "model-00001-of-00002.safetensors")
        | {"x": "model-00002-of-00002.safetensors"}
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, "1 of 2 shards are not there: model-00002-of-00002.safetensors")


def test_pickles_are_not_read(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    refused(path, "no weights", "pytorch_model.bin is not read")


def test_bfloat16_on_disk(folder: Callable[..., Path]) -> None:
    def halve(arrays: Arrays) -> None:
        arrays.update({name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()})

    source = open_checkpoint(folder(halve))
    assert source.meta["stored"] == "BF16 x12"
    assert source.weights.read("norm/scale").dtype == np.float32


def test_missing_path_and_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").mkdir()
    refused(tmp_path / "modle.ckpt", "no such file or folder", "did you mean 'model.ckpt'?")


def test_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path, "no checkpoint (holds notes.txt)", "effc.json", ".gguf")


def test_config_that_is_not_json(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "config.json").write_text("{")
    refused(path, "config.json: not JSON")


def test_unknown_dtype(folder: Callable[..., Path]) -> None:
    refused(folder(), "no 'float23'", "did you mean 'float32'?", dtype="float23")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": 9, "module": "m.py:build"}, ("format 9, want 1",)),
        ({"format": 1}, ("no 'module'",)),
        (
            {"format": 1, "module": "m.py:build", "contxt": 3},
            ("no setting 'contxt'", "did you mean 'context'?"),
        ),
        ({"format": 1, "module": "m.py:build"}, ("params 'params' is not there",)),
    ],
)
def test_effc_json(tmp_path: Path, settings: dict, words: tuple[str, ...]) -> None:
    (tmp_path / "effc.json").write_text(json.dumps(settings))
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("model.py", ("want FILE.py:FUNCTION",)),
        ("nowhere.py:build", ("no file", "nowhere.py")),
        ("no_such_package:build", ("No module named", "a file is written with its .py")),
        ("{}:buidl", ("has no 'buidl'", "did you mean 'build'?")),
        ("{}:number", ("returned int, want a flax.linen or flax.nnx Module",)),
        ("{}:keyed", ("cannot take this config",)),
    ],
)
def test_module_reference(folder: Callable[..., Path], module: str, words: tuple[str, ...]) -> None:
    path = folder()
    file = path / "mine.py"
    file.write_text("def build(): ...\ndef number(): return 3\ndef keyed(*, size): ...\n")
    refused(path, *words, module=module.format(file))


def test_truncated_msgpack(tmp_path: Path) -> None:
    from flax import serialization

    (tmp_path / "mine.py").write_text("from flax import linen\ndef build(): return linen.Embed(4, 4)\n")
    file = tmp_path / "m.msgpack"
    file.write_bytes(serialization.to_bytes({"embedding": np.ones((4, 4), np.float32)}))
    cut(file, 0.6)
    refused(file, "truncated or not Flax msgpack", module="mine.py:build")


def test_orbax_tree_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from flax import linen\ndef build(): return linen.Embed(4, 4)\n")
    path = save_checkpoint(
        tmp_path / "m.ckpt", f"{tmp_path}/mine.py:build", {}, {"embeddings": np.ones((4, 4), np.float32)}
    )
    refused(path, "no tensor 'embedding'", "did you mean 'embeddings'?")


def test_save_checkpoint_does_not_overwrite(tmp_path: Path) -> None:
    with pytest.raises(EffcError, match="is there already"):
        save_checkpoint(tmp_path, "m:build", {}, {})


@pytest.mark.parametrize("keep", [0.0005, 0.3, 0.999])
def test_truncated_gguf(tmp_path: Path, keep: float) -> None:
    refused(gguf_file(tmp_path, "llama", keep), "m.gguf: truncated", "bytes")


@pytest.mark.parametrize(
    ("arch", "keys", "words"),
    [
        ("lama", {}, ("no family 'lama'", "did you mean 'llama'?")),
        ("llama", {"llama.expert_count": 8}, ("8 experts",)),
        ("llama", {"llama.rope.dimension_count": 2}, ("rope turns 2 of 4",)),
        ("llama", {"split.count": 3}, ("one of 3 parts",)),
        ("llama", {"tokenizer.ggml.model": "bert"}, ("tokenizer model 'bert' is not supported",)),
        (
            "llama",
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smolm"},
            ("pre-tokenizer 'smolm'", "'smollm'?"),
        ),
    ],
)
def test_gguf_of_another_kind(tmp_path: Path, arch: str, keys: dict, words: tuple[str, ...]) -> None:
    refused(gguf_file(tmp_path, arch, 1.0, keys), *words)


def gguf_file(folder: Path, arch: str, keep: float, keys: dict[str, Any] | None = None) -> Path:
    gguf = pytest.importorskip("gguf")
    file = folder / "m.gguf"
    writer = gguf.GGUFWriter(file, arch)
    numbers = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 12, "context_length": 32}
    numbers |= {"attention.head_count": 2, "attention.head_count_kv": 1}
    for key, value in ({f"{arch}.{k}": v for k, v in numbers.items()} | (keys or {})).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        LAYER: "blk.0",
    }
    names |= {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
    }
    names |= {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"} | {
        f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")
    }
    for name, shape in SHAPES.items():
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cut(file, keep)
    return file
