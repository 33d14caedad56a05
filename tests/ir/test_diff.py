"""What a diff of two modules says, and what the counts of ops are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from effc.ir import Delta, Module, deltas, diff, parse
from effc.ir.diff import touched

TINY = (Path(__file__).parent / "tiny.effc").read_text()


def edited(*edits: tuple[str, str]) -> Module:
    text = TINY
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return parse(text)


def changes(*edits: tuple[str, str]) -> dict[str, Delta]:
    return deltas(parse(TINY), edited(*edits))


def test_equal_modules_differ_in_nothing():
    assert diff(parse(TINY), parse(TINY)) == ""
    assert changes() == {}


def test_a_diff_reads_like_the_change():
    after = edited(
        ("module @tiny", "module @small"), ("context=64", "context=128"),
        ("@layers.qkv: 3 * f32[64,128]", "@layers.qkv: 3 * q4{group=32,sym}[64,128]"),
        ('  param @norm: f32[64] = "norm/scale"\n', ""), (" [scale=@norm]", ""),
        ("gelu(%u) {approx=erf}", "silu(%u)"),
        ("decode greedy {", "decode speculative { gamma=4,"),
    )  # fmt: skip
    assert diff(parse(TINY), after) == (
        "module @tiny -> @small\n"
        "meta:\n"
        "  - context=64\n"
        "  + context=128\n"
        "params:\n"
        '  - param @norm: f32[64] = "norm/scale"\n'
        "  ~ param @layers.qkv: 3 * f32[64,128] -> q4{group=32,sym}[64,128]\n"
        "block @layer(%x: f32[b,t,64], %cos: f32[b,t,8], %sin: f32[b,t,8]):\n"
        "    ... 18 lines the same\n"
        "    %x1: f32[b,t,64] = lax.add(%x, %a2)\n"
        "    %u: f32[b,t,96] = linear(%x1) [w=@layers.up]\n"
        "  - %g: f32[b,t,96] = gelu(%u) {approx=erf}\n"
        "  + %g: f32[b,t,96] = silu(%u)\n"
        "    %d: f32[b,t,64] = linear(%g) [w=@layers.down]\n"
        "    %x2: f32[b,t,64] = lax.add(%x1, %d)\n"
        "    return %x2\n"
        "func @forward(%tokens: i32[b,t]):\n"
        "    ... 2 lines the same\n"
        "    %cos, %sin: f32[b,t,8], f32[b,t,8] = rope_table(%pos) {dims=16, theta=10000.0}\n"
        "    %x1: f32[b,t,64] = repeat(%x0, %cos, %sin) {block=@layer, times=3}\n"
        "  - %n: f32[b,t,64] = norm(%x1) [scale=@norm] {kind=rms, eps=1e-05}\n"
        "  + %n: f32[b,t,64] = norm(%x1) {kind=rms, eps=1e-05}\n"
        "    %l: f32[b,t,160] = linear(%n) [w=@embed] {layout=nk}\n"
        "    %logits: f32[b,t,160] = softcap(%l) {cap=30.0}\n"
        "    return %logits\n"
        "decode:\n"
        "  - decode greedy { forward=@forward }\n"
        "  + decode speculative { gamma=4, forward=@forward }\n"
    )


def test_functions_that_come_and_go():
    gone = "effc 1 module @m { }"
    there = "effc 1 module @m { func @f(%x: f32[2]) { %y: f32[2] = silu(%x) return %y } }"
    assert diff(parse(gone), parse(there)) == ("+ func @f(%x: f32[2]):\n  + %y: f32[2] = silu(%x)\n  + return %y\n")
    assert diff(parse(there), parse(gone)) == ("- func @f(%x: f32[2]):\n  - %y: f32[2] = silu(%x)\n  - return %y\n")


def test_a_changed_signature_is_shown():
    one = "effc 1 module @m { func @f(%x: f32[2]) { return } }"
    assert diff(parse(one), parse(one.replace("[2]", "[3]"))) == (
        "func @f(%x: f32[3]):\n  - func @f(%x: f32[2]) {\n  + func @f(%x: f32[3]) {\n    return\n"
    )


def test_order_of_params_is_no_difference():
    one = "effc 1 module @m { param @a: f32[] param @b: f32[] }"
    assert diff(parse(one), parse("effc 1 module @m { param @b: f32[] param @a: f32[] }")) == ""


def test_an_op_of_another_kind():
    assert changes(("gelu(%u) {approx=erf}", "silu(%u)")) == {
        "layer": Delta(added=Counter(silu=1), removed=Counter(gelu=1))
    }


def test_an_op_with_another_attribute_parameter_or_type():
    assert changes(("approx=erf", "approx=tanh")) == {"layer": Delta(altered=Counter(gelu=1))}
    assert changes(("w=@layers.o]", "w=@embed]")) == {"layer": Delta(altered=Counter(linear=1))}
    assert changes(("%pos: i32[b,t]", "%pos: i16[b,t]")) == {"forward": Delta(altered=Counter(positions=1))}


def test_an_op_with_another_region():
    assert changes(("lax.sub(%j, %i)", "lax.sub(%i, %j)")) == {"layer": Delta(altered=Counter(attention=1))}


def test_renaming_and_moving_touch_nothing():
    assert changes(("%qkv", "%joined")) == {"layer": Delta(rewired=Counter(split=1))}
    assert changes(("lax.add(%x1, %d)", "lax.add(%d, %x1)")) == {"layer": Delta(rewired=Counter({"lax.add": 1}))}
    first, second = "    %k1: f32[b,t,2,16] = lax.reshape(%k0) {new_sizes=(b,t,2,16)}\n", "    %x1"
    assert changes((first, ""), (second, first + second)) != {}  # %k1 is read before: not legal, but counted
    assert touched(parse(TINY), edited((first, ""), ("    %v1:", first + "    %v1:"))) == frozenset()


def test_a_linear_that_took_two_places():
    three = """effc 1 module @m { param @w: f32[4,4] param @v: f32[4,4] param @wv: f32[4,8]
      func @f(%x: f32[4]) {
        %a: f32[4] = linear(%x) [w=@w] %b: f32[4] = linear(%x) [w=@v] %c: f32[4] = lax.add(%a, %b)
        return %c
      } }"""
    fused = three.replace(
        "%a: f32[4] = linear(%x) [w=@w] %b: f32[4] = linear(%x) [w=@v]",
        "%ab: f32[8] = linear(%x) [w=@wv] %a, %b: f32[4], f32[4] = split(%ab) {sizes=(4,4)}",
    )
    (change,) = deltas(parse(three), parse(fused)).values()
    assert change == Delta(added=Counter(linear=1, split=1), removed=Counter(linear=2))
    assert change.touched() == {"linear", "split"}
