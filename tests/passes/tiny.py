"""A decoder of two layers as text, and random arrays for any module."""

from __future__ import annotations

import numpy as np

from effc.ir.core import Module
from effc.ir.parser import parse
from effc.weights import Lazy, Store, parts

TINY = """
effc 1
module @tiny {
  meta { context = 64, vocab = 160 }
  param @embed: f32[160,64] = "embed/embedding"
  param @norm: f32[64] = "norm/scale"
  param @layers.norm1: 2 * f32[64] = "layers_*/norm1/scale"
  param @layers.norm2: 2 * f32[64] = "layers_*/norm2/scale"
  param @layers.attn.q: 2 * f32[64,64] = "layers_*/attn/q/kernel"
  param @layers.attn.k: 2 * f32[64,32] = "layers_*/attn/k/kernel"
  param @layers.attn.v: 2 * f32[64,32] = "layers_*/attn/v/kernel"
  param @layers.attn.o: 2 * f32[64,64] = "layers_*/attn/o/kernel"
  param @layers.mlp.gate: 2 * f32[64,96] = "layers_*/mlp/gate/kernel"
  param @layers.mlp.up: 2 * f32[64,96] = "layers_*/mlp/up/kernel"
  param @layers.mlp.down: 2 * f32[96,64] = "layers_*/mlp/down/kernel"
  block @layer(%x: f32[b,t,64], %cos: f32[b,t,8], %sin: f32[b,t,8]) {
    %h: f32[b,t,64] = norm(%x) [scale=@layers.norm1] {kind=rms, eps=1e-05}
    %q0: f32[b,t,64] = linear(%h) [w=@layers.attn.q]
    %k0: f32[b,t,32] = linear(%h) [w=@layers.attn.k]
    %v0: f32[b,t,32] = linear(%h) [w=@layers.attn.v]
    %q1: f32[b,t,4,16] = lax.reshape(%q0) {new_sizes=(b,t,4,16)}
    %k1: f32[b,t,2,16] = lax.reshape(%k0) {new_sizes=(b,t,2,16)}
    %v1: f32[b,t,2,16] = lax.reshape(%v0) {new_sizes=(b,t,2,16)}
    %q2: f32[b,t,4,16] = rope(%q1, %cos, %sin)
    %k2: f32[b,t,2,16] = rope(%k1, %cos, %sin)
    %a0: f32[b,t,4,16] = attention(%q2, %k2, %v1) {scale=0.25}
    %a1: f32[b,t,64] = lax.reshape(%a0) {new_sizes=(b,t,64)}
    %a2: f32[b,t,64] = linear(%a1) [w=@layers.attn.o]
    %x1: f32[b,t,64] = lax.add(%x, %a2)
    %m: f32[b,t,64] = norm(%x1) [scale=@layers.norm2] {kind=rms, eps=1e-05}
    %gate: f32[b,t,96] = linear(%m) [w=@layers.mlp.gate]
    %up: f32[b,t,96] = linear(%m) [w=@layers.mlp.up]
    %g: f32[b,t,96] = silu(%gate)
    %gu: f32[b,t,96] = lax.mul(%g, %up)
    %d: f32[b,t,64] = linear(%gu) [w=@layers.mlp.down]
    %x2: f32[b,t,64] = lax.add(%x1, %d)
    return %x2
  }
  func @forward(%tokens: i32[b,t]) {
    %x0: f32[b,t,64] = embed(%tokens) [table=@embed]
    %pos: i32[b,t] = positions(%tokens)
    %cos, %sin: f32[b,t,8], f32[b,t,8] = rope_table(%pos) {dims=16, theta=10000.0}
    %x1: f32[b,t,64] = repeat(%x0, %cos, %sin) {block=@layer, times=2}
    %n: f32[b,t,64] = norm(%x1) [scale=@norm] {kind=rms, eps=1e-05}
    %logits: f32[b,t,160] = linear(%n) [w=@embed] {layout=nk}
    return %logits
  }
  decode greedy { forward=@forward }
}
"""


def tiny() -> Module:
    """The decoder above."""
    return parse(TINY)


def random_store(module: Module, seed: int = 0) -> Store:
    """Dense arrays for every parameter, the same for the same seed and name."""

    def lazy(index: int, name: str) -> Lazy:
        param = module.params[name]
        part = parts(param.type)[""]

        def read(layer: int) -> dict[str, np.ndarray]:
            rng = np.random.default_rng([seed, index, layer])
            near = 1.0 if len(part.shape) == 1 else 0.0
            return {"": (near + 0.1 * rng.standard_normal(part.shape)).astype(part.dtype)}

        return Lazy(param, read)

    return Store({name: lazy(i, name) for i, name in enumerate(module.params)})
