"""A checkpoint of two billion parameters, zeros on disk but for its norms: coded within 3 GB of memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WIDE, LAYERS, MIDDLE, VOCAB = 2048, 28, 8192, 65536
LIMIT = 3 * 10**9


def tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama checkpoint."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDE), "model.norm.weight": (WIDE,)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        out |= {f"{at}.self_attn.{name}_proj.weight": (WIDE, WIDE) for name in "qkvo"}
        out |= {f"{at}.mlp.{name}_proj.weight": (MIDDLE, WIDE) for name in ("gate", "up")}
        out[f"{at}.mlp.down_proj.weight"] = (WIDE, MIDDLE)
        out |= {f"{at}.{name}_layernorm.weight": (WIDE,) for name in ("input", "post_attention")}
    return out


def checkpoint(folder: Path) -> int:
    """A folder as Hugging Face has them; the number of parameters. The file has holes where its zeros are."""
    entries, offset = {}, 0
    for name, shape in tensors().items():
        size = 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for entry in entries.values():
            if len(entry["shape"]) == 1:
                file.seek(8 + len(header) + entry["data_offsets"][0])
                file.write(np.full(entry["shape"], 0x3F80, np.uint16).tobytes())  # 1.0 in bfloat16
        file.truncate(8 + len(header) + offset)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDE, "num_hidden_layers": LAYERS,
        "intermediate_size": MIDDLE, "vocab_size": VOCAB, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return offset // 2


@pytest.mark.slow
def test_two_billion_parameters_take_less_than_three_gigabytes(tmp_path: Path) -> None:
    source, out = tmp_path / "large", tmp_path / "out"
    source.mkdir()
    count = checkpoint(source)
    assert count > 2e9
    code = (
        "import sys, effc; effc.optimize(sys.argv[1], sys.argv[2], 'quant4{method=absmax}', speed=False, "
        f"eval_tokens=8, window=8, max_memory={LIMIT})"
    )
    words = [sys.executable, "-c", code, str(source), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    print(f"{count} parameters, peak {report['peak_bytes'] / 1e9:.2f} GB, {report['seconds']}")
    assert report["after"]["parameters"] == count
    assert report["peak_bytes"] < LIMIT
    size = sum(file.stat().st_size for file in out.glob("model*.safetensors"))
    assert abs(size / report["planned"]["nbytes"] - 1) < 0.02
