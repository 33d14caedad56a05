"""Pieces of a stack, blocks that repeat blocks, calls, and entry functions: emitted is interpreted is unrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from effc.backend.to_python import emit, load_program
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.rewrite import unroll
from effc.ir.stream import run
from effc.ir.verify import verify
from tests.backend.conftest import random_store

TOKENS = np.random.default_rng(1).integers(0, 12, (2, 9)).astype(np.int32)

MODULE = """effc 1
module @small {
  meta { vocab = 12, context = 64 }
  param @embed: f32[12,8]
  param @layers.w: 4 * f32[8,8]
  param @layers.qkv: 4 * f32[8,24]
  param @depth.shift: 2 * f32[8,8]
  param @last: f32[8]
  block @layer(%x: f32[b,t,8]) {
    %h: f32[b,t,24] = linear(%x) [w=@layers.qkv]
    %q, %k, %v: f32[b,t,8], f32[b,t,8], f32[b,t,8] = split(%h) {sizes=(8,8,8)}
    %q1: f32[b,t,2,4] = lax.reshape(%q) {new_sizes=(b,t,2,4)}
    %k1: f32[b,t,2,4] = lax.reshape(%k) {new_sizes=(b,t,2,4)}
    %v1: f32[b,t,2,4] = lax.reshape(%v) {new_sizes=(b,t,2,4)}
    %a: f32[b,t,2,4] = attention(%q1, %k1, %v1) {scale=0.5}
    %a1: f32[b,t,8] = lax.reshape(%a) {new_sizes=(b,t,8)}
    %y: f32[b,t,8] = linear(%a1) [w=@layers.w]
    %z: f32[b,t,8] = lax.add(%x, %y)
    return %z
  }
  block @recursion(%x: f32[b,t,8]) {
    %s: f32[b,t,8] = linear(%x) [w=@depth.shift]
    %y: f32[b,t,8] = repeat(%s) {block=@layer, times=2, start=1}
    return %y
  }
  func @head(%x: f32[b,t,8]) {
    %n: f32[b,t,8] = norm(%x) [scale=@last] {kind=rms, eps=1e-05}
    %logits: f32[b,t,12] = linear(%n) [w=@embed] {layout=nk}
    return %logits
  }
  func @draft(%tokens: i32[b,t]) {
    %x: f32[b,t,8] = embed(%tokens) [table=@embed]
    %y: f32[b,t,8] = repeat(%x) {block=@layer, times=1}
    %logits: f32[b,t,12] = call(%y) {func=@head}
    return %logits, %y
  }
  func @forward(%tokens: i32[b,t]) {
    %x: f32[b,t,8] = embed(%tokens) [table=@embed]
    %first: f32[b,t,8] = repeat(%x) {block=@layer, times=1}
    %deep: f32[b,t,8] = repeat(%first) {block=@recursion, times=2}
    %end: f32[b,t,8] = repeat(%deep) {block=@layer, times=1, start=3}
    %logits: f32[b,t,12] = call(%end) {func=@head}
    return %logits
  }
  decode speculative { forward=@forward, kind=model, drafter=@draft, gamma=2 }
}
"""


def test_legal_and_round_trips() -> None:
    module = parse(MODULE)
    assert verify(module) == []
    assert parse(dump(module)) == module


def test_a_span_past_the_stack_is_a_fault() -> None:
    (fault, *_) = verify(parse(MODULE.replace("times=1, start=3", "times=2, start=3")))
    assert "start=3, times=2, but @layers.qkv in @layer is stacked 4 times" in str(fault)


def test_a_call_with_other_types_is_a_fault() -> None:
    wrong = MODULE.replace("%logits: f32[b,t,12] = call(%end)", "%logits: f32[b,t,13] = call(%end)")
    assert any(
        "@head returns (f32[b,t,12]), declared are (f32[b,t,13])" in str(fault) for fault in verify(parse(wrong))
    )


def test_emitted_is_interpreted_in_any_chunking(emitted: Callable[[str], Any]) -> None:
    made = emitted(MODULE)
    want = made.interpreted(TOKENS)
    np.testing.assert_allclose(made.forward(TOKENS), want, atol=1e-5)
    np.testing.assert_allclose(made.in_steps(TOKENS, [3, 1, 5]), want, atol=1e-5)
    assert 'for p in params["layers"][1:3]:' in made.source


def test_unrolled_is_the_same_function() -> None:
    module = parse(MODULE)
    flat = unroll(module, "forward")
    assert not any(op.kind == "repeat" for op in flat.forward().ops)
    store = random_store(module)
    split = {f"{name}.{i}": store[name].arrays[i] for name, p in module.params.items() for i in range(p.stack)}
    plain = random_store(flat) | {
        name: type(store["embed"])(flat.params[name], [array]) for name, array in split.items() if name in flat.params
    }
    plain |= {name: store[name] for name in ("embed", "last")}
    want = run(module, store, jnp.asarray(TOKENS))
    np.testing.assert_allclose(np.asarray(run(flat, plain, jnp.asarray(TOKENS))), np.asarray(want), atol=1e-5)


def test_other_entry_functions_are_programs_too(emitted: Callable[[str], Any]) -> None:
    made = emitted(MODULE)
    draft = made.engine.program.entries["draft"]
    logits, features, cache = draft(made.engine.params, jnp.asarray(TOKENS))
    assert logits.shape == (2, 9, 12) and features.shape == (2, 9, 8) and len(cache.entries) == 1
    speculative = "decode speculative { forward=@forward, kind=model, drafter=@draft, gamma=2 }"
    first = load_program(emit(parse(MODULE.replace(speculative, "decode greedy { forward=@draft }"))))
    np.testing.assert_allclose(np.asarray(first.extend(made.engine.params, jnp.asarray(TOKENS))[0]), logits, atol=1e-6)


BOTH = MODULE.replace("linear(%a1) [w=@layers.w]", "linear(%a1) [w=@layers.w, bias=@deltas.b]").replace(
    "  param @last", "  param @deltas.b: 4 * f32[8]\n  param @last"
)


def test_a_block_may_read_two_groups(emitted: Callable[[str], Any]) -> None:
    made = emitted(BOTH)
    np.testing.assert_allclose(made.forward(TOKENS), made.interpreted(TOKENS), atol=1e-5)
    assert 'for p_layers, p_deltas in zip(params["layers"][1:3], params["deltas"][1:3]):' in made.source
