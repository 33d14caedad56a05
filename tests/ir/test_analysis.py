"""Numbers that can be counted by hand on the tiny module."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from effc.ir import Module, parse
from effc.ir import analysis as an
from effc.ir.rewrite import unroll

TINY = (Path(__file__).parent / "tiny.effc").read_text()

EMBED = 160 * 64 * 4
LAYER = {
    "norm1": 64 * 4, "qkv": 64 * 128 * 4, "o": 64 * 64 * 4,
    "up": 64 * 96 // 2 + 2 * 96 * 2,  # 4-bit codes, two groups of 32 along 64 rows, f16 scales
    "down": 96 * 64 + 96 * 2 * 4,  # 8-bit codes, an f32 scale and zero for each row
}  # fmt: skip
SLOPES = 4 * 4


def tiny() -> Module:
    return parse(TINY)


def test_parameters():
    assert an.param_count(tiny()) == 160 * 64 + 64 + 4 + 3 * (64 + 64 * 128 + 64 * 64 + 64 * 96 + 96 * 64)
    assert an.param_bytes(tiny()) == EMBED + 64 * 4 + SLOPES + 3 * sum(LAYER.values())


def test_parameters_by_use_and_dtype():
    groups = {(g.use, g.dtype): (g.names, g.bytes) for g in an.param_groups(tiny())}
    assert groups == {
        ("embed+linear", "f32"): (("embed",), EMBED),
        ("norm", "f32"): (("norm", "layers.norm1"), 4 * 64 * 4),
        ("attention+param", "f32"): (("slopes",), SLOPES),
        ("linear", "f32"): (("layers.qkv", "layers.o"), 3 * (LAYER["qkv"] + LAYER["o"])),
        ("linear", "q4{group=32,sym,scale=f16}"): (("layers.up",), 3 * LAYER["up"]),
        ("linear", "q8{channel,asym,axis=-1}"): (("layers.down",), 3 * LAYER["down"]),
    }
    weights = [g.bytes for g in an.param_groups(tiny())]
    assert weights == sorted(weights, reverse=True)


def test_a_parameter_that_nothing_reads():
    module = parse("effc 1 module @m { param @w: bf16[3,5] }")
    assert an.param_groups(module) == [an.ParamGroup("unused", "bf16", ("w",), 15, 30)]


def test_ops_and_runs():
    kinds = an.ops_by_kind(tiny())
    assert kinds["forward"] == Counter(["embed", "positions", "rope_table", "repeat", "norm", "linear", "softcap"])
    assert kinds["layer"]["lax.mul"] == 1  # inside the region
    assert an.runs(tiny()) == Counter(layer=3, forward=1)
    assert an.runs(tiny(), "layer") == Counter(layer=1)


def test_weights_read_for_a_token():
    row, head = 64 * 4, EMBED
    every_layer = sum(LAYER.values()) + 2 * SLOPES  # by the attention op, and by `param` in its region
    assert an.weight_bytes_per_token(tiny()) == row + head + 64 * 4 + 3 * every_layer
    assert an.weight_bytes_per_token(unroll(tiny(), "forward")) == an.weight_bytes_per_token(tiny())


def test_a_table_that_is_only_indexed_is_read_by_the_row():
    text = """effc 1 module @m { param @wpe: f32[1024,8] func @forward(%p: i32[b,t]) {
      %w: f32[1024,8] = param() [value=@wpe]
      %e: f32[b,t,8] = lax.gather(%w, %p)
      return %e
    } }"""
    assert an.weight_bytes_per_token(parse(text)) == 8 * 4
    whole = text.replace("return %e", "%s: f32[1024,8] = lax.neg(%w) return %e, %s")
    assert an.weight_bytes_per_token(parse(whole)) == 1024 * 8 * 4


def test_cache_bytes():
    assert an.cache_bytes_per_token(tiny()) == 3 * 2 * (2 * 16) * 4
    assert an.cache_bytes_per_token(tiny(), dtype="bf16") == 3 * 2 * (2 * 16) * 2
    window = """effc 1 module @m { func @forward(%x: f32[b,t,8]) {
      %y: f32[b,t,8] = window(%x) {why="a scan"} body(%z: f32[b,t,8]) { return %z }
      return %y
    } }"""
    assert an.cache_bytes_per_token(parse(window)) == 8 * 4


def test_arithmetic():
    layer = 64 * 128 + 64 * 64 + 64 * 96 + 96 * 64
    attention = 4 * (16 + 16)  # scores and sums, for each key
    assert an.flops_per_token(tiny()) == 2 * (3 * (layer + attention) + 64 * 160)
    assert an.flops_per_token(tiny(), context=9) == 2 * (3 * (layer + 10 * attention) + 64 * 160)


def test_arithmetic_of_what_was_not_raised():
    text = """effc 1 module @m { param @w: f32[8,5] func @forward(%x: f32[b,t,8]) {
      %w: f32[8,5] = param() [value=@w]
      %y: f32[b,t,5] = lax.dot_general(%x, %w) {contract=((2,),(0,))}
      return %y
    } }"""
    assert an.flops_per_token(parse(text)) == 2 * 8 * 5
