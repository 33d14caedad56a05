"""Programs that mix tokens in other ways than attention: what becomes of each, and that nothing wrong is emitted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import effc
from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.frontend import Lowered, lower
from effc.frontend.check import check
from effc.frontend.source import Source, load_all
from effc.ir import dump, parse, verify
from effc.runtime.cache import Cache, cache_shapes, empty_cache
from effc.runtime.weights import load_params
from effc.weights import write_safetensors

EXACT = 1e-4
"""Largest difference of logits as a part of their range: f32 sums in other orders."""

CACHED = frozenset({"attention", "window", "running", "recur"})

VOCAB, WIDTH, CONTEXT = 61, 32, 32

Mix = Callable[[Any, jax.Array], jax.Array]
"""Parameters and x[b,t,32] -> what is added to x."""


@pytest.fixture(autouse=True)
def usual_promotion() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def program(mix: Mix) -> Source:
    """Embedding, mix, an MLP, a head."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCAB, WIDTH), "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "conv": (4, WIDTH),
        "up": (WIDTH, 48), "down": (48, WIDTH), "head": (WIDTH, VOCAB), "sink": (1,),
    }  # fmt: skip
    params = {name: rng.normal(size=shape, scale=0.2).astype(np.float32) for name, shape in shapes.items()}

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        x = x + mix(params, x)
        x = x + jax.nn.silu(x @ params["up"]) @ params["down"]
        return x @ params["head"]

    return effc.load(forward, params, name="stress", context=CONTEXT)


def shift_by_pad(p: Any, x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1] @ p["v"]


def shift_by_roll(p: Any, x: jax.Array) -> jax.Array:
    """The first token gets zeros, not the last token's values."""
    first = jnp.arange(x.shape[1])[None, :, None] == 0
    return jnp.where(first, 0.0, jnp.roll(x, 1, axis=1)) @ p["v"]


def linear_attention(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jax.nn.elu(x @ p["q"]) + 1, jax.nn.elu(x @ p["k"]) + 1, x @ p["v"]
    state = jnp.cumsum(k[..., :, None] * v[..., None, :], axis=1)
    return jnp.einsum("btk,btkv->btv", q, state) / jnp.sum(q * jnp.cumsum(k, axis=1), -1, keepdims=True)


def scan_over_tokens(p: Any, x: jax.Array) -> jax.Array:
    def step(state: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(row @ p["k"] + state @ p["q"])
        return state, state

    _, out = lax.scan(step, jnp.zeros((x.shape[0], WIDTH)), x.swapaxes(0, 1))
    return out.swapaxes(0, 1)


def causal_conv(p: Any, x: jax.Array) -> jax.Array:
    kernel = p["conv"][:, None, :]
    return lax.conv_general_dilated(
        x, kernel, (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=WIDTH
    )


def attend(p: Any, x: jax.Array, seen: Any) -> jax.Array:
    scores = jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"]) / WIDTH**0.5
    return jax.nn.softmax(jnp.where(seen, scores, -1e9)) @ (x @ p["v"])


def captured_mask(p: Any, x: jax.Array) -> jax.Array:
    """The mask is an array of numpy, made when the program is traced."""
    return attend(p, x, np.tril(np.ones((x.shape[1], x.shape[1]), bool))[None])


def captured_sinusoids(p: Any, x: jax.Array) -> jax.Array:
    """So is the table of positions."""
    angles = np.arange(x.shape[1])[:, None] / 100.0 ** (np.arange(16) / 16)[None]
    return attend(p, x + np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32), causal(x))


def causal(x: jax.Array) -> jax.Array:
    return jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None]


def flat_mlp(p: Any, x: jax.Array) -> jax.Array:
    """Batch and tokens are one axis in the MLP."""
    b, t, d = x.shape
    mixed = attend(p, x, jnp.tril(jnp.ones((t, t), bool))[None])
    rows = (x + mixed).reshape(b * t, d)
    return mixed + (jax.nn.gelu(rows @ p["up"]) @ p["down"]).reshape(b, t, d)


def taps(p: Any, x: jax.Array) -> jax.Array:
    """A convolution as a sum of shifted rows."""
    t, wide = x.shape[1], jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
    return sum((wide[:, i : i + t] * p["conv"][i] for i in range(4)), jnp.zeros(()))


def mean_so_far(p: Any, x: jax.Array) -> jax.Array:
    count = 1 + jnp.arange(x.shape[1])[None, :, None]
    return jnp.cumsum(x, axis=1) / count @ p["v"]


def averaging(p: Any, x: jax.Array) -> jax.Array:
    """Causal averages as a product with a triangle, no softmax."""
    weights = causal(x) / (1.0 + jnp.arange(x.shape[1]))[None, :, None]
    return jnp.einsum("bqk,bkd->bqd", jnp.broadcast_to(weights, (x.shape[0], *weights.shape[1:])), x @ p["v"])


def greatest_so_far(p: Any, x: jax.Array) -> jax.Array:
    return lax.cummax(x @ p["v"], axis=1)


def decayed_sum(p: Any, x: jax.Array) -> jax.Array:
    """A linear recurrence by an associative scan."""
    decay = jax.nn.sigmoid(x @ p["q"])

    def both(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[1] * right[0] + right[1]

    return lax.associative_scan(both, (decay, x @ p["v"]), axis=1)[1]


def counting_scan(p: Any, x: jax.Array) -> jax.Array:
    """The carry counts tokens, and what is scanned has positions beside it."""

    def step(state: Any, item: Any) -> Any:
        count, total = state
        row, place = item
        total = total + row * jnp.cos(place)
        return (count + 1, total), total / (count + 1.0)

    places = jnp.arange(x.shape[1], dtype=jnp.float32)
    return lax.scan(step, (0, jnp.zeros((x.shape[0], WIDTH))), (x.swapaxes(0, 1), places))[1].swapaxes(0, 1)


def no_pads(p: Any, x: jax.Array) -> jax.Array:
    """Keys whose first number is negative are seen by nobody but themselves."""
    there = x[:, None, :, 0] > 0
    return attend(p, x, (there & causal(x)) | jnp.eye(x.shape[1], dtype=bool)[None])


def counted(p: Any, x: jax.Array) -> jax.Array:
    """Positions count the tokens that are no padding, which nobody else sees."""
    there = x[..., 0] > 0
    place = jnp.maximum(jnp.cumsum(there, axis=1) - 1, 0)
    angles = place[..., None] / 100.0 ** (jnp.arange(16) / 16)
    rows = x + jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return attend(p, rows, (there[:, None] & causal(x)) | jnp.eye(x.shape[1], dtype=bool)[None])


def flat_heads(p: Any, x: jax.Array) -> jax.Array:
    """Sequences and heads are one axis of batched products."""
    b, t, _ = x.shape
    q, k, v = ((x @ p[n]).reshape(b, t, 4, 8).transpose(0, 2, 1, 3).reshape(b * 4, t, 8) for n in "qkv")
    shares = jax.nn.softmax(jnp.where(causal(x), q @ k.swapaxes(1, 2), -1e9))
    return (shares @ v).reshape(b, 4, t, 8).transpose(0, 2, 1, 3).reshape(b, t, WIDTH)


def late_window(p: Any, x: jax.Array) -> jax.Array:
    """Keys that are hidden after the softmax still count in its sum."""
    place = jnp.arange(x.shape[1])
    shares = jax.nn.softmax(jnp.where(causal(x), jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"]), -1e9))
    return jnp.where(place[None] > place[:, None] - 4, shares, 0) @ (x @ p["v"])


def block_local(p: Any, x: jax.Array) -> jax.Array:
    """Tokens see their own block of four."""
    block = jnp.arange(x.shape[1]) // 4
    return attend(p, x, causal(x) & (block[:, None] == block[None])[None])


def sink(p: Any, x: jax.Array) -> jax.Array:
    """One more score that takes part in the softmax and stands for no token."""
    scores = jnp.where(causal(x), jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"]) / WIDTH**0.5, -1e9)
    extra = jnp.broadcast_to(p["sink"], (*scores.shape[:2], 1))
    return jax.nn.softmax(jnp.concatenate([scores, extra], -1))[..., :-1] @ (x @ p["v"])


def relative_bias(p: Any, x: jax.Array) -> jax.Array:
    """A bias for each distance, of a table that the model has learned."""
    place = jnp.arange(x.shape[1])
    far = jnp.clip(place[:, None] - place[None], 0, VOCAB - 1)
    scores = jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"]) / WIDTH**0.5 + p["embed"][:, 0][far]
    return jax.nn.softmax(jnp.where(causal(x), scores, -1e9)) @ (x @ p["v"])


def latent(p: Any, x: jax.Array) -> jax.Array:
    """Keys and values of all heads from a few numbers a token."""
    b, t, _ = x.shape
    small = x @ p["k"][:, :8]
    q = (x @ p["q"]).reshape(b, t, 4, 8)
    k, v = (jnp.einsum("btc,chd->bthd", small, w.reshape(8, 4, 8)) for w in (p["k"][:8], p["v"][:8]))
    scores = jnp.where(causal(x)[:, None], jnp.einsum("bqhd,bkhd->bhqk", q, k), -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(b, t, WIDTH)


def dot_product(p: Any, x: jax.Array) -> jax.Array:
    """jax.nn's attention, grouped, of the last five tokens."""
    b, t, _ = x.shape
    q = (x @ p["q"]).reshape(b, t, 4, 8)
    k, v = ((x @ p[n][:, :16]).reshape(b, t, 2, 8) for n in "kv")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(4, 0)).reshape(b, t, WIDTH)


def shared_keys(p: Any, x: jax.Array) -> jax.Array:
    """Two layers that read the keys and values of the first."""
    y = attend(p, x, causal(x))
    scores = jnp.einsum("bqd,bkd->bqk", (x + y) @ p["q"], x @ p["k"]) / WIDTH**0.5
    return y + jax.nn.softmax(jnp.where(causal(x), scores, -1e9)) @ (x @ p["v"])


def soft_prompt(p: Any, x: jax.Array) -> jax.Array:
    """Three learned rows stand before the tokens."""
    first = jnp.broadcast_to(p["q"][:3], (x.shape[0], 3, WIDTH))
    rows = jnp.concatenate([first, x], 1)
    return attend(p, rows, causal(rows))[:, 3:]


def one_hot_experts(p: Any, x: jax.Array) -> jax.Array:
    """All experts for all tokens; weights of the best two."""
    gates = jax.nn.softmax(x.reshape(-1, WIDTH) @ p["head"][:, :4])
    best, which = lax.top_k(gates, 2)
    weights = jnp.sum(jax.nn.one_hot(which, 4) * best[..., None], 1)
    made = jnp.einsum("nd,edf->nef", x.reshape(-1, WIDTH), jnp.stack([p["q"], p["k"], p["v"], -p["q"]]))
    return jnp.einsum("ne,nef->nf", weights, made).reshape(x.shape)


def gathered_experts(p: Any, x: jax.Array) -> jax.Array:
    """Every token with its own expert's weights."""
    which = jnp.argmax(x @ p["head"][:, :2], -1)
    return jnp.einsum("btd,btdf->btf", x, jnp.stack([p["q"], p["k"]])[which])


def sorted_experts(p: Any, x: jax.Array) -> jax.Array:
    """One of two experts a token; tokens are sorted by expert and brought back."""
    b, t, d = x.shape
    rows = x.reshape(b * t, d)
    expert = jnp.argmax(rows @ p["head"][:, :2], -1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=2).astype(jnp.int32)
    made = lax.ragged_dot(rows[order], jnp.stack([p["q"], p["k"]]), sizes)
    return jnp.zeros_like(made).at[order].set(made).reshape(b, t, d)


def sorted_by_sequence(p: Any, x: jax.Array) -> jax.Array:
    """The same in each sequence, brought back by the inverse order."""
    order = jnp.argsort(jnp.argmax(x @ p["head"][:, :2], -1), axis=1)
    rows = jnp.take_along_axis(x, order[..., None], 1)
    made = jnp.where(jnp.argmax(rows @ p["head"][:, :2], -1)[..., None] == 0, rows @ p["q"], rows @ p["k"])
    return jnp.take_along_axis(made, jnp.argsort(order, axis=1)[..., None], 1)


def mean_of_all(p: Any, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.mean(x, axis=1, keepdims=True), x.shape) @ p["v"]


def sum_of_all(p: Any, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), x.shape) @ p["v"]


def encoder(p: Any, x: jax.Array) -> jax.Array:
    return attend(p, x, jnp.ones((x.shape[1], x.shape[1]), bool)[None])


def flipped(p: Any, x: jax.Array) -> jax.Array:
    return x[:, ::-1] @ p["v"]


def last_to_all(p: Any, x: jax.Array) -> jax.Array:
    return x + x[:, -1:] @ p["v"]


def both_directions(p: Any, x: jax.Array) -> jax.Array:
    """A recurrence from the last token to the first."""
    return lax.scan(lambda s, row: (s + row, s + row), jnp.zeros(x.shape[::2]), x.swapaxes(0, 1), reverse=True)[
        1
    ].swapaxes(0, 1)


def over_the_batch(p: Any, x: jax.Array) -> jax.Array:
    return x - jnp.sum(x, axis=0, keepdims=True)


def turned_batch(p: Any, x: jax.Array) -> jax.Array:
    """Every sequence gets something of another."""
    return jnp.roll(x, 1, axis=0) @ p["v"]


def scaled_by_length(p: Any, x: jax.Array) -> jax.Array:
    return x * np.float32(np.log(x.shape[1]))


def chosen_branch(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(x[0, 0, 0] > 0, lambda y: y, lambda y: -y, x)


def looped(p: Any, x: jax.Array) -> jax.Array:
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1])), (0, x))[1]


@dataclass(frozen=True)
class Outcome:
    """Ops that look back beside attention, how far windows do, and whether a note warns of a cost."""

    ops: str
    back: int | None = None


DECODES: dict[Mix, Outcome] = {
    flat_mlp: Outcome("attention"), captured_mask: Outcome("attention"), captured_sinusoids: Outcome("attention"),
    latent: Outcome("attention"), dot_product: Outcome("attention"), shared_keys: Outcome("attention attention"),
    one_hot_experts: Outcome(""), gathered_experts: Outcome(""),
    shift_by_pad: Outcome("window", 1), shift_by_roll: Outcome("window", 1), causal_conv: Outcome("window", 3),
    taps: Outcome("window", 3), sorted_experts: Outcome("window", 0), sorted_by_sequence: Outcome("window", 0),
    linear_attention: Outcome("running running"), mean_so_far: Outcome("running"), greatest_so_far: Outcome("running"),
    scan_over_tokens: Outcome("recur"), counting_scan: Outcome("recur"), decayed_sum: Outcome("recur"),
    no_pads: Outcome("attention"), counted: Outcome("running attention"), block_local: Outcome("attention"),
    sink: Outcome("attention"), relative_bias: Outcome("attention"), flat_heads: Outcome("attention"),
    averaging: Outcome("window"), soft_prompt: Outcome("window"), late_window: Outcome("window"),
}  # fmt: skip


SAMPLE = {
    captured_mask,
    shift_by_roll,
    taps,
    sorted_experts,
    linear_attention,
    counting_scan,
    relative_bias,
    soft_prompt,
}
"""Of the programs, those that every run of the tests takes."""


def sampled(names: Iterable[Mix]) -> list[Any]:
    return [pytest.param(m, id=m.__name__, marks=() if m in SAMPLE else pytest.mark.slow) for m in names]


@pytest.mark.parametrize("mix", sampled(DECODES))
def test_decodes(mix: Mix, tmp_path: Path) -> None:
    """The expected ops; the emitted program is the module, whole and step by step."""
    wanted, source = DECODES[mix], program(mix)
    lowered = lower(source)
    assert verify(lowered.module) == []
    assert parse(dump(lowered.module)) == lowered.module
    found = [op for func in lowered.module.funcs.values() for op in func.ops if op.kind in CACHED]
    assert " ".join(op.kind for op in found) == wanted.ops
    assert {op.attrs.get("lookback") for op in found if op.kind == "window"} <= {wanted.back}
    warned = [note for note in lowered.notes if "the whole window" in note]
    assert len(warned) == (wanted.ops == "window" and wanted.back is None)
    assert all(re.search(r"test_stress\.py:\d+", note) for note in warned)
    steps_are_the_whole(source, lowered, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mix", DECODES, ids=[mix.__name__ for mix in DECODES])
def test_interpreted(mix: Mix) -> None:
    lowered_and_checked(program(mix))


@pytest.mark.parametrize("mix", [sorted_experts, counting_scan], ids=lambda mix: mix.__name__)
def test_interpreted_sample(mix: Mix) -> None:
    lowered_and_checked(program(mix))


def steps_are_the_whole(source: Source, lowered: Lowered, folder: Path) -> None:
    """Ragged prompts, then token by token, over a cache full of large numbers."""
    write_safetensors(folder / "model.safetensors", lowered.module, lowered.store)
    emitted = load_program(emit(lowered.module))
    params = load_params(folder / "model.safetensors", emitted.params)
    tokens = np.random.default_rng(3).integers(0, VOCAB, (3, 20), np.int32)
    whole = np.asarray(jax.jit(source.forward)(load_all(source), jnp.asarray(tokens)))
    span, extend = np.abs(whole).max(), jax.jit(emitted.extend)
    np.testing.assert_allclose(extend(params, jnp.asarray(tokens))[0], whole, atol=EXACT * span)
    cache = poisoned(empty_cache(cache_shapes(emitted.extend, params, 3), CONTEXT))
    at, rows = np.array((9, 1, 6), np.int32), np.arange(3)
    made, cache = extend(params, jnp.asarray(tokens[:, :9]), cache, jnp.asarray(at))
    for count in (1,) * 6:
        np.testing.assert_allclose(made[:, -1], whole[rows, at - 1], atol=EXACT * span)
        made, cache = extend(params, jnp.asarray(tokens[rows, at][:, None]), cache)
        at += count
    four = jnp.asarray(tokens[rows[:, None], at[:, None] + np.arange(4)])
    made, _ = extend(params, four, cache)
    wanted = whole[rows[:, None], at[:, None] + np.arange(4)]
    np.testing.assert_allclose(made, wanted, atol=EXACT * span)


def poisoned(cache: Cache) -> Cache:
    """Rows that mean nothing hold large numbers: reading one shows."""
    entries = jax.tree.map(lambda x: jnp.full_like(x, 1e4 if x.dtype.kind == "f" else 1), cache.entries)
    return Cache(cache.lengths, entries)


def layered(mix: Mix) -> Source:
    """Three layers with weights of their own."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (4, WIDTH), "up": (WIDTH, 48), "down": (48, WIDTH)} | dict.fromkeys("qkv", (WIDTH, WIDTH))
    shapes |= {"embed": (VOCAB, WIDTH), "head": (WIDTH, VOCAB), "sink": (1,)}
    whole = {n: {k: rng.normal(size=s, scale=0.2).astype(np.float32) for k, s in shapes.items()} for n in "0123"}

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["3"]["embed"][tokens]
        for p in (params[n] for n in "012"):
            x = x + mix(p, x)
            x = x + jax.nn.silu(x @ p["up"]) @ p["down"]
        return x @ params["3"]["head"]

    return effc.load(forward, whole, name="layered", context=CONTEXT)


LAYERED = [relative_bias, pytest.param(taps, marks=pytest.mark.slow), pytest.param(sink, marks=pytest.mark.slow)]


@pytest.mark.parametrize("mix", [*LAYERED, pytest.param(sorted_experts, marks=pytest.mark.slow)])
def test_layers_that_mix_alike_are_one_block(mix: Mix, tmp_path: Path) -> None:
    source = layered(mix)
    lowered = lower(source)
    (repeat,) = [op for op in lowered.module.forward().ops if op.kind == "repeat"]
    assert repeat.attrs["times"] == 3
    assert [op.kind for op in lowered.module.forward().ops] == ["embed", "repeat", "linear"]
    steps_are_the_whole(source, lowered, tmp_path)


LINE = r"test_stress\.py:\d+.*: "

REFUSED = {
    mean_of_all: LINE + r"a number depends on the size of the call \(12.0 for tokens \[2, 12\], 16.0 for \[3, 16\]\)",
    sum_of_all: LINE + "not causal: 'lax.reduce_sum' .* takes all tokens",
    encoder: LINE + "not causal: 'lax.dot_general' .* later ones",
    flipped: LINE + "not causal: 'lax.rev'",
    last_to_all: LINE + "not causal: 'lax.slice'",
    both_directions: LINE + "not causal: 'lax.scan'",
    over_the_batch: LINE + "'lax.reduce_sum' .* mixes the sequences of a batch",
    turned_batch: LINE + "'lax.slice' .* mixes the sequences of a batch",
    scaled_by_length: LINE + "a number depends on the size of the call",
    chosen_branch: LINE + "primitive 'cond' .* want jnp.where",
    looped: LINE + "primitive 'while' .* want jax.lax.scan",
}


@pytest.mark.parametrize(("mix", "why"), REFUSED.items(), ids=[mix.__name__ for mix in REFUSED])
def test_refused(mix: Mix, why: str) -> None:
    with pytest.raises(EffcError, match=why):
        lowered_and_checked(program(mix))


def lowered_and_checked(source: Source) -> None:
    check(lower(source), source)
