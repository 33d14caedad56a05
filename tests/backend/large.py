"""Modules of the sizes of known models, as quant4 and fuse leave them; there are no weights."""

from __future__ import annotations

from effc.backend.tpu.models import MODELS, Sizes
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.passes import runner
from effc.pipeline import Pipeline

PARAMS = """
  param @embed: {table}[{V},{d}]
  param @norm: f32[{d}]
  param @head: {coded}[{d},{V}]
  param @layers.norm1: {L} * f32[{d}]
  param @layers.norm2: {L} * f32[{d}]
  param @layers.q: {L} * {coded}[{d},{q}]
  param @layers.k: {L} * {coded}[{d},{kv}]
  param @layers.v: {L} * {coded}[{d},{kv}]
  param @layers.o: {L} * {coded}[{q},{d}]
  param @layers.gate: {L} * {coded}[{d},{f}]
  param @layers.up: {L} * {coded}[{d},{f}]
  param @layers.down: {L} * {coded}[{f},{d}]
"""

LAYER = """
  block @layer(%x: f32[b,t,{d}], %cos: f32[b,t,{half}], %sin: f32[b,t,{half}]) {{
    %h: f32[b,t,{d}] = norm(%x) [scale=@layers.norm1] {{kind=rms, eps=1e-05}}
    %q0: f32[b,t,{q}] = linear(%h) [w=@layers.q]
    %k0: f32[b,t,{kv}] = linear(%h) [w=@layers.k]
    %v0: f32[b,t,{kv}] = linear(%h) [w=@layers.v]
    %q1: f32[b,t,{h},{head}] = lax.reshape(%q0) {{new_sizes=(b,t,{h},{head})}}
    %k1: f32[b,t,{g},{head}] = lax.reshape(%k0) {{new_sizes=(b,t,{g},{head})}}
    %v1: f32[b,t,{g},{head}] = lax.reshape(%v0) {{new_sizes=(b,t,{g},{head})}}
    %q2: f32[b,t,{h},{head}] = rope(%q1, %cos, %sin)
    %k2: f32[b,t,{g},{head}] = rope(%k1, %cos, %sin)
    %a: f32[b,t,{h},{head}] = attention(%q2, %k2, %v1) {{{cache}scale=0.1}}
    %a1: f32[b,t,{q}] = lax.reshape(%a) {{new_sizes=(b,t,{q})}}
    %o: f32[b,t,{d}] = linear(%a1) [w=@layers.o]
    %x1: f32[b,t,{d}] = lax.add(%x, %o)
    %h1: f32[b,t,{d}] = norm(%x1) [scale=@layers.norm2] {{kind=rms, eps=1e-05}}
    %gate: f32[b,t,{f}] = linear(%h1) [w=@layers.gate]
    %up: f32[b,t,{f}] = linear(%h1) [w=@layers.up]
    %s: f32[b,t,{f}] = silu(%gate)
    %m: f32[b,t,{f}] = lax.mul(%s, %up)
    %down: f32[b,t,{d}] = linear(%m) [w=@layers.down]
    %y: f32[b,t,{d}] = lax.add(%x1, %down)
    return %y
  }}
"""

FORWARD = """
  func @forward(%tokens: i32[b,t]) {{
    %x0: f32[b,t,{d}] = embed(%tokens) [table=@embed]
    %pos: i32[b,t] = positions(%tokens)
    %cos, %sin: f32[b,t,{half}], f32[b,t,{half}] = rope_table(%pos) {{dims={head}, theta=500000.0}}
    %x1: f32[b,t,{d}] = repeat(%x0, %cos, %sin) {{block=@layer, times={L}}}
    %n: f32[b,t,{d}] = norm(%x1) [scale=@norm] {{kind=rms, eps=1e-05}}
    %logits: f32[b,t,{V}] = linear(%n) [w=@head]
    return %logits
  }}
  decode greedy {{ forward=@forward }}
"""


def large(model: str, *, group: int = 128, cache: str = "i8", layers: int = 0, fused: bool = True) -> Module:
    """A Llama of those sizes with weights of 4 bits."""
    m: Sizes = MODELS[model]
    coded = f"q4{{group={group},sym,scale=f16}}"
    numbers = {
        "d": m.width, "q": m.heads * m.head, "kv": m.groups * m.head, "f": m.hidden, "V": m.vocab, "h": m.heads,
        "g": m.groups, "head": m.head, "half": m.head // 2, "L": layers or m.layers, "coded": coded,
        "table": "q8{channel,sym,scale=f16,axis=-1}", "cache": f"cache={cache}, " if cache else "",
    }  # fmt: skip
    body = "".join(part.format(**numbers) for part in (PARAMS, LAYER, FORWARD))
    module = parse(
        f"effc 1\nmodule @{model.replace('-', '_')} {{\n  meta {{ context = 8192, vocab = {m.vocab} }}{body}}}\n"
    )
    return runner.run(module, Pipeline.parse("fuse").ordered())[-1].after if fused else module
