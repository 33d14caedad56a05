"""A checkpoint of two small layers over letters, and an artifact of it: commands take seconds on these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from effc.cli import main

WIDTH, HIDDEN, LAYERS, VOCAB, CONTEXT = 32, 64, 2, 96, 64
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}
SHAPES = {
    "input_layernorm": (WIDTH,),
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH // 2, WIDTH),
    "self_attn.v_proj": (WIDTH // 2, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "post_attention_layernorm": (WIDTH,),
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}

Arrays = dict[str, np.ndarray]


def arrays() -> Arrays:
    """Hugging Face names; the same numbers every time."""
    shapes = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    shapes |= {"model.embed_tokens": (VOCAB, WIDTH), "model.norm": (WIDTH,)}
    rng = np.random.default_rng(0)
    scales = {name: 1.0 if len(shape) == 1 else 0.3 for name, shape in shapes.items()}
    return {f"{n}.weight": (rng.normal(size=s) * scales[n]).astype(np.float32) for n, s in shapes.items()}


def letter_tokenizer() -> Tokenizer:
    """A token for each printable ASCII letter, space and newline (spelt as byte-level tokenizers do)."""
    letters = [*map(chr, range(33, 127)), "\u0120", "\u010a"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(arrays(), folder / "model.safetensors")
    letter_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(tiny, tmp_path / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to evaluate on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    return file


@pytest.fixture(scope="session")
def artifact(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`effc optimize tiny --passes quant4`. Tests that change it copy it first."""
    out = tmp_path_factory.mktemp("artifact") / "out"
    line = ["optimize", str(tiny), "--passes", "quant4", "--eval", str(text), "--no-speed", "-o", str(out)]
    assert main(line) == 0
    return out


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """refused([words], "part", ...): exit 1, nothing on stdout, one line on stderr with these parts."""

    def check(line: list[object], *parts: str) -> None:
        capsys.readouterr()
        assert main([str(word) for word in line]) == 1
        out, err = capsys.readouterr()
        lines = [text for text in err.splitlines() if text.startswith("effc: ")]
        assert out == "" and len(lines) == 1 and err.rstrip().endswith(lines[0]), err
        assert "Traceback" not in err
        for part in parts:
            assert part in lines[0]

    return check
