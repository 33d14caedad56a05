"""Every format opens to a Source whose forward equals the model that was saved."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx, serialization
from safetensors.numpy import save_file

from effc.errors import EffcError
from effc.frontend.adapt import from_linen, from_nnx
from effc.frontend.checkpoints import open_checkpoint, save_checkpoint
from effc.frontend.checkpoints.user_code import load_build
from effc.frontend.source import Source, flatten, load_all, unflatten
from effc.frontend.tokenizer import Tokenizer

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

LINEN = """
    import jax.numpy as jnp
    from flax import linen as nn

    class Model(nn.Module):
        vocab: int
        width: int

        @nn.compact
        def __call__(self, tokens, train: bool):
            table = nn.Embed(self.vocab, self.width, name="embed")
            x = table(tokens)
            for i in range(2):
                x = x + nn.Dropout(0.5, deterministic=not train)(nn.Dense(self.width, name=f"layers_{i}")(x))
            return table.attend(jnp.cumsum(x, axis=1))

    def build(vocab=16, width=8):
        return Model(vocab, width)
"""

NNX = """
    import jax.numpy as jnp
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, width, rngs):
            self.dense = nnx.Linear(width, width, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.table = nnx.Variable(jnp.arange(width, dtype=jnp.float32).reshape(1, 1, -1))

        def __call__(self, x):
            return x + self.drop(self.dense(x)) * self.table[...]

    class Model(nnx.Module):
        def __init__(self, vocab, width, rngs):
            self.embed = nnx.Embed(vocab, width, rngs=rngs)
            self.blocks = nnx.List([Block(width, rngs) for _ in range(3)])

        def __call__(self, tokens, positions):
            x = self.embed(tokens) + positions[..., None].astype(jnp.float32)
            for block in self.blocks:
                x = block(x)
            return self.embed.attend(x)

    def build(vocab=16, width=8):
        return Model(vocab, width, nnx.Rngs(0))
"""


def code(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "model.py"
    file.write_text(dedent(text))
    return file


def module_of(file: Path) -> Any:
    return load_build(f"{file}:build", file.parent)()


def linen_model(tmp_path: Path) -> tuple[Path, Any, np.ndarray]:
    file = code(tmp_path, LINEN)
    module = module_of(file)
    params = jax.tree.map(np.asarray, module.init(jax.random.key(1), TOKENS, False)["params"])
    return file, params, module.apply({"params": params}, TOKENS, False)


def nnx_model(tmp_path: Path) -> tuple[Path, Any, np.ndarray]:
    file = code(tmp_path, NNX)
    module = module_of(file)
    module.eval()
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    return file, nnx.state(module, nnx.Param), module(TOKENS, positions)


def check(source: Source, logits: Any) -> None:
    np.testing.assert_allclose(source.forward(load_all(source), TOKENS), logits, atol=1e-5)
    assert source.meta["vocab"] == 16


def save_orbax(folder: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder, tree)
    return folder


def test_saved_linen_checkpoint_opens_by_itself(tmp_path: Path) -> None:
    file, params, logits = linen_model(tmp_path)
    path = save_checkpoint(tmp_path / "m.ckpt", f"{file}:build", {"width": 8}, params, context=64)
    file.unlink()
    source = open_checkpoint(path)
    check(source, logits)
    assert source.context == 64
    assert set(flatten(source.spec)) == set(source.weights.names())


def test_the_bundled_checkpoint_opens(checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    assert source.name == "stdlib12"
    assert source.context == 512
    assert set(flatten(source.spec)) == set(source.weights.names())
    assert Tokenizer(source.tokenizer).vocab_size <= int(source.meta["vocab"])


def test_saved_nnx_checkpoint_with_list_of_blocks(tmp_path: Path) -> None:
    """Orbax stores the list's integer keys as text."""
    file, params, logits = nnx_model(tmp_path)
    source = open_checkpoint(save_checkpoint(tmp_path / "m.ckpt", f"{file}:build", {}, params))
    check(source, logits)
    assert "blocks/2/dense/kernel" in source.weights.names()


def test_config_and_dtype_can_be_overridden(tmp_path: Path) -> None:
    file, params, _ = linen_model(tmp_path)
    path = save_checkpoint(tmp_path / "m.ckpt", f"{file}:build", {"width": 4}, params)
    source = open_checkpoint(path, config={"width": 8}, dtype="bfloat16")
    assert source.weights.read("embed/embedding").dtype == jnp.bfloat16


@pytest.mark.parametrize("wrapped", [lambda p: p, lambda p: {"params": p, "step": np.int32(3)}])
def test_bare_orbax_with_module(tmp_path: Path, wrapped: Any) -> None:
    file, params, logits = linen_model(tmp_path)
    check(
        open_checkpoint(save_orbax(tmp_path / "7" / "params", wrapped(params)).parent.parent, module=f"{file}:build"),
        logits,
    )


def test_orbax_of_an_nnx_state_with_random_state(tmp_path: Path) -> None:
    file = code(tmp_path, NNX)
    module = module_of(file)
    state = nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.RngCount)))
    _, _, logits = nnx_model(tmp_path)
    check(open_checkpoint(save_orbax(tmp_path / "state", state), module=f"{file}:build"), logits)


def test_msgpack_with_module(tmp_path: Path) -> None:
    file, params, logits = linen_model(tmp_path)
    (tmp_path / "m.msgpack").write_bytes(
        serialization.to_bytes({"params": params, "step": 3, "name": "x" * 40, "lr": 0.1})
    )
    check(open_checkpoint(tmp_path / "m.msgpack", module=f"{file}:build"), logits)


def test_safetensors_with_module(tmp_path: Path) -> None:
    file, params, logits = linen_model(tmp_path)
    save_file({k.replace("/", "."): np.asarray(v) for k, v in flatten(params).items()}, tmp_path / "m.safetensors")
    check(open_checkpoint(tmp_path / "m.safetensors", module=f"{file}:build"), logits)


def test_scanned_boxed_linen_module() -> None:
    """Layers stacked by nn.scan, parameters boxed with sharding names, a constant collection beside them."""

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            init = linen.with_partitioning(linen.initializers.lecun_normal(), ("in", "out"))
            table = self.variable("constants", "table", lambda: jnp.arange(8, dtype=jnp.float32).reshape(1, 1, 8))
            return x + linen.Dense(8, kernel_init=init)(x) * table.value, None

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: jax.Array, attention_mask: jax.Array, deterministic: bool = False) -> dict:
            x = linen.Embed(16, 8)(tokens) * attention_mask[..., None].astype(jnp.float32)
            axes: dict[Any, Any] = {"params": 0, "constants": 0}
            named = {linen.PARTITION_NAME: "layers"}
            x, _ = linen.scan(
                Block, variable_axes=axes, split_rngs={"params": True}, length=3, metadata_params=named
            )()(x, None)
            return {"logits": linen.Dense(16)(linen.Dropout(0.5)(x, deterministic=deterministic))}

    module = Model()
    variables = module.init(jax.random.key(0), TOKENS, jnp.ones_like(TOKENS), True)
    forward, spec = from_linen(module)
    params = linen.meta.unbox(variables["params"])
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, spec)
    out: Any = module.apply(variables, TOKENS, jnp.ones_like(TOKENS), True)
    want = out["logits"]
    np.testing.assert_allclose(forward(params, TOKENS), want, atol=1e-6)
    again, _ = from_linen(module, params)
    np.testing.assert_allclose(again(params, TOKENS), want, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embedding": np.zeros((4, 5))}, r"'embedding' is \[4, 5\], want \[4, 3\]"),
        ({"embeding": np.zeros((4, 3))}, "no parameter 'embedding'; did you mean 'embeding'"),
        ({"embedding": np.zeros((4, 3)), "bias": np.zeros(3)}, "the module has no parameter 'bias'"),
    ],
)
def test_parameters_of_another_module(change: dict, words: str) -> None:
    with pytest.raises(EffcError, match=words):
        from_linen(linen.Embed(4, 3), change)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_running_statistics_are_refused(kind: str) -> None:
    """They are trained too, and would be taken for constants as initialised."""
    layers = nnx.Sequential(nnx.Embed(16, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    plain = linen.Sequential([linen.Embed(16, 8), linen.BatchNorm(use_running_average=True)])
    with pytest.raises(EffcError, match="running statistics"):
        from_nnx(layers) if kind == "nnx" else from_linen(plain)


def test_a_module_in_memory_stays_in_its_mode() -> None:
    model = nnx.Sequential(
        nnx.Embed(16, 8, rngs=nnx.Rngs(0)),
        nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
        nnx.Linear(8, 16, rngs=nnx.Rngs(0)),
    )
    forward, spec = from_nnx(model)
    dropout: Any = model.layers[1]
    assert not dropout.deterministic
    assert set(flatten(spec)) == {"layers/0/embedding", "layers/2/kernel", "layers/2/bias"}
    params = unflatten(flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    np.testing.assert_array_equal(forward(params, TOKENS), forward(params, TOKENS))


def test_unknown_required_argument_is_named(tmp_path: Path) -> None:
    text = LINEN.replace("train: bool", "image").replace("not train", "True")
    file = code(tmp_path, text)
    save_file({"embed.embedding": np.zeros((16, 8), np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(EffcError, match="wants argument 'image'"):
        open_checkpoint(tmp_path / "m.safetensors", module=f"{file}:build")


def test_hugging_face_flax_msgpack(tmp_path: Path) -> None:
    """FlaxGPT2 keeps Conv1D kernels [out,in]; everything else is [in,out]."""
    config = {
        "model_type": "gpt2",
        "vocab_size": 16,
        "n_embd": 8,
        "n_head": 2,
        "n_layer": 1,
        "n_positions": 8,
    }
    rng = np.random.default_rng(0)
    shapes = {
        "wte.weight": (16, 8),
        "wpe.weight": (8, 8),
        **{f"h.0.{n}.{leaf}": (8,) for n in ("ln_1", "ln_2") for leaf in ("weight", "bias")},
        "h.0.attn.c_attn.weight": (8, 24),
        "h.0.attn.c_attn.bias": (24,),
        "h.0.attn.c_proj.weight": (8, 8),
        "h.0.attn.c_proj.bias": (8,),
        "h.0.mlp.c_fc.weight": (8, 32),
        "h.0.mlp.c_fc.bias": (32,),
        "h.0.mlp.c_proj.weight": (32, 8),
        "h.0.mlp.c_proj.bias": (8,),
        "ln_f.weight": (8,),
        "ln_f.bias": (8,),
    }
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    one, two = tmp_path / "torch", tmp_path / "flax"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, one / "model.safetensors")  # without the 'transformer.' prefix, as the hub's gpt2 has it
    tree: dict[str, Any] = {}
    for name, array in weights.items():
        *parents, leaf = f"transformer.{name}".split(".")
        kind = "embedding" if parents[-1] in ("wte", "wpe") else "scale" if array.ndim == 1 else "kernel"
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node["bias" if leaf == "bias" else kind] = array.T if kind == "kernel" else array
    (two / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    a, b = open_checkpoint(one), open_checkpoint(two)
    check(b, a.forward(load_all(a), TOKENS))
