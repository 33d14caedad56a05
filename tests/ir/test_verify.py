"""Every fault the verifier knows, one a case, by the edit of a good module's text that makes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from effc.errors import EffcError
from effc.ir import Module, check, parse, verify, warnings

TINY = (Path(__file__).parent / "tiny.effc").read_text()

# name: (what to replace, by what, the message of the first fault)
EDITS = {
    "an unknown op": ("= gelu(", "= geluu(", "no op is named 'geluu'; did you mean 'gelu'?"),
    "an unknown value": ("linear(%g)", "linear(%gg)", "%gg is not defined; did you mean 'g'?"),
    "a value before its op": ("linear(%x1)", "linear(%x2)", "%x2 is used before it is defined"),
    "a value twice": ("%g: f32[b,t,96]", "%u: f32[b,t,96]", "%u is defined twice, want a new name"),
    "one op, a value twice": ("%q0, %k0, %v0", "%q0, %k0, %k0", "%k0 is defined twice, want a new name"),
    "an input twice": (
        "(%x: f32[b,t,64], %cos", "(%cos: f32[b,t,64], %cos", "%cos is defined twice, want a new name"),
    "an unknown result": ("return %x2", "return %qkw", "%qkw is not defined; did you mean 'qkv'?"),
    "too few operands": ("rope(%q1, %cos, %sin)", "rope(%q1, %cos)", "2 operands, want 3 (x, cos, sin)"),
    "too many operands": ("gelu(%u)", "gelu(%u, %u)", "2 operands, want 1 (x)"),
    "too few of any number": (
        "attention(%q2, %k2, %v1)", "attention(%q2)", "1 operand, want 3 or more (q, k, v, extra*)"),
    "a missing parameter": (
        "linear(%g) [w=@layers.down]", "linear(%g)", "parameter 'w' is missing, want [w=@...]"),
    "an unknown role": (
        "[w=@layers.o]", "[w=@layers.o, bia=@norm]",
        "no parameter is called 'bia', want w or bias; did you mean 'bias'?"),
    "an unknown parameter": (
        "w=@layers.o]", "w=@layer.o]", "w: no parameter is called @layer.o; did you mean 'layers.o'?"),
    "a role of an op that has none": (
        "lax.add(%x, %a2)", "lax.add(%x, %a2) [w=@norm]", "no parameter is called 'w', want none"),
    "a missing attribute": (" {cap=30.0}", "", "attribute 'cap' is missing, want {cap=...} (a number)"),
    "an unknown attribute": (
        "{cap=30.0}", "{cap=30.0, cup=1}", "no attribute is called 'cup', want cap; did you mean 'cap'?"),
    "a word not among the choices": (
        "approx=erf", "approx=erff", "approx=erff, want tanh or erf; did you mean 'erf'?"),
    "a word for a number": ("cap=30.0", "cap=none", "cap=none, want a number"),
    "a truth for a whole number": ("dims=16", "dims=true", "dims=true, want a whole number"),
    "a fraction for whole numbers": (
        "sizes=(64,32,32)", "sizes=(64,32,32.0)", "sizes=(64,32,32.0), want whole numbers like (1,2)"),
    "a word for a name": ("block=@layer", "block=layer", "block=layer, want a name like @x"),
    "an unknown name": (
        "block=@layer", "block=@layr", "block: nothing is called @layr; did you mean 'layer'?"),
    "a region of an op that has none": (
        "gelu(%u) {approx=erf}", "gelu(%u) bias() { return }", "no region is called 'bias', want none"),
    "an unknown region": (
        "} bias(%i", "} bais(%i", "no region is called 'bais', want bias; did you mean 'bias'?"),
    "a region without its mask": (", mask=region", "", "mask=region and a region 'bias' go together"),
    "a region that reads outside": (
        "lax.sub(%j, %i)", "lax.sub(%j, %q2)",
        "%q2 is a value outside the region, want one of the region's own"),
    "a result the region has not": (
        "return %r", "return %q2", "%q2 is a value outside the region, want one of the region's own"),
    "a declared type": ("%n: f32[b,t,64]", "%n: f32[b,t,65]", "%n is declared f32[b,t,65], want f32[b,t,64]"),
    "a product of the wrong sizes": (
        "linear(%g) [w=@layers.down]", "linear(%g) [w=@layers.o]",
        "x is f32[b,t,96] and w is f32[64,64]: 96 is not 64"),
    "heads that differ": (
        "%k2: f32[b,t,2,16] = rope(%k1, %cos, %sin)", "%k2: f32[b,t,3,16] = lax.tile(%k1)",
        "k is f32[b,t,3,16] and v is f32[b,t,2,16]: different heads"),
    "heads that do not divide": (
        "%a0: f32[b,t,4,16] = attention(%q2, %k2, %v1)", "%a0: f32[b,t,2,16] = attention(%k2, %q2, %q2)",
        "2 query heads do not divide among 4 key heads"),
    "the number of values": (
        "%cos, %sin: f32[b,t,8], f32[b,t,8] = rope_t", "%cos: f32[b,t,8] = rope_t",
        "defines 1 values, want 2"),
    "sizes to split by": (
        "(64,32,32)", "(64,32,33)", "sizes add up to 129, want 128, the last axis of f32[b,t,128]"),
    "operands that do not line up": (
        "lax.add(%x, %a2)", "lax.add(%x, %qkv)", "operands f32[b,t,64], f32[b,t,128] do not line up"),
    "times that the stacks are not": (
        "times=3", "times=4", "times=4, but @layers.norm1 in @layer is stacked 3 times"),
    "no times": ("times=3", "times=0", "times=0, want 1 or more"),
    "a carry too long": ("times=3", "times=3, carry=4", "carry=4, want 1 to 3, the number of operands"),
    "operands that the block does not take": (
        "repeat(%x0, %cos, %sin)", "repeat(%x0, %cos)",
        "operands are (f32[b,t,64], f32[b,t,8]), @layer wants (f32[b,t,64], f32[b,t,8], f32[b,t,8])"),
    "a block that cannot be fed back": (
        "return %x2", "return %g", "@layer returns (f32[b,t,96]), want (f32[b,t,64]) to feed back"),
    "a stack outside a block": (
        "norm(%x1) [scale=@norm]", "norm(%x1) [scale=@layers.norm1]",
        "scale: @layers.norm1 is stacked 3 times, want it read in a block that repeat runs"),
    "a decode of nothing": (
        "forward=@forward", "forward=@forwrd", "forward: nothing is called @forwrd; did you mean 'forward'?"),
    "a decode of a block": ("forward=@forward", "forward=@layer", "forward: @layer is a block, want a func"),
    "a dtype": (
        "@norm: f32[64]", "@norm: fp32[64]", "no dtype is called 'fp32'; did you mean 'f32'?"),
    "a group below none": ("q4{group=32", "q4{group=-32", "group=-32, want more than 0, or channel"),
    "an axis outside": ("axis=-1", "axis=-3", "axis=-3 of 2 axes, want -2 to -1"),
    "bits": ("q4{", "q9{", "9 bits a code, want 2 to 8"),
    "the dtype of scales": ("scale=f16}", "scale=f15}", "no dtype is called 'f15'; did you mean 'f16'?"),
    "a parameter of no fixed size": (
        "@slopes: f32[4]", "@slopes: f32[b]", "is f32[b], want sizes that are numbers"),
    "a size below none": ("@slopes: f32[4]", "@slopes: f32[-4]", "f32[-4] has a size of -4, want 0 or more"),
    "half a size": (
        "@slopes: f32[4]", "@slopes: f32[1/2]", "f32[1/2] has a size of 1/2, want a whole number"),
    "a stack below none": ("3 * f32[64] =", "-3 * f32[64] =", "is stacked -3 times, want 0 or more"),
    "numbers of the path": ("over (0,6,2)", "over (0,6,1)", "over (0,6,1) names 6 arrays, want 3"),
    "a step of none": (
        "over (0,6,2)", "over (0,6,0)", "over is (0,6,0), want (start,stop,step) with a step other than 0"),
    "a permutation": ("perm (1,0)", "perm (1,1)", "perm is (1,1), want each axis once"),
    "a size as a setting": (
        "context=64", "context=b", "context is b, want a string, a number, true or false"),
}  # fmt: skip


def edited(old: str, new: str) -> Module:
    assert old in TINY
    return parse(TINY.replace(old, new, 1))


@pytest.mark.parametrize("name", EDITS)
def test_the_fault_of_an_edit(name: str):
    old, new, message = EDITS[name]
    assert next(fault.message for fault in verify(edited(old, new))) == message


def test_a_func_where_a_block_is_wanted():
    messages = [fault.message for fault in verify(edited("block @layer(", "func @layer("))]
    assert messages[-1] == "@layer is a func, want a block"
    assert len(messages) == 6  # five stacked parameters stand outside a block now


def test_a_good_module_has_none():
    check(parse(TINY))
    assert verify(parse("effc 1 module @empty { }")) == []


def test_faults_show_the_line_and_what_was_wanted():
    text = TINY.replace("= gelu(%u)", "= geluu(%u)").replace("forward=@", "forward=@no_")
    with pytest.raises(EffcError) as caught:
        check(parse(text), "fuse")
    assert str(caught.value) == (
        "fuse: @tiny has 2 faults\n"
        "@layer: %g: f32[b,t,96] = geluu(%u) {approx=erf}\n"
        "    no op is named 'geluu'; did you mean 'gelu'?\n"
        "decode: decode greedy { forward=@no_forward }\n"
        "    forward: nothing is called @no_forward; did you mean 'forward'?"
    )


def test_a_fault_in_a_region_says_which():
    (fault,) = verify(parse(TINY.replace("lax.sub(%j, %i)", "lax.sub(%j, %d)")))
    assert (fault.where, fault.message) == ("@layer.bias", "%d is used before it is defined")


def test_a_parameter_that_nothing_reads_is_a_warning():
    module = parse(TINY.replace("param @norm:", 'param @idle: f32[2] = "x"\n  param @norm:'))
    assert verify(module) == []
    assert [str(w) for w in warnings(module)] == ['@idle: param @idle: f32[2] = "x"\n    nothing reads it']


def test_functions_that_run_each_other():
    text = """effc 1 module @m {
      block @a(%x: f32[]) { %y: f32[] = repeat(%x) {block=@b, times=1} return %y }
      block @b(%x: f32[]) { %y: f32[] = repeat(%x) {block=@a, times=1} return %y }
    }"""
    assert [str(f) for f in verify(parse(text))] == [
        "@a: runs itself, want no cycle",
        "@b: runs itself, want no cycle",
    ]


def test_things_filed_under_another_name():
    module = parse(TINY)
    moved = replace(
        module,
        params={**module.params, "alias": module.params["norm"]},
        funcs={**module.funcs, "main": module.funcs["forward"]},
    )
    assert [f.message for f in verify(moved)] == ["is filed as @alias", "is filed as @main"]


def test_an_attribute_the_text_cannot_hold():
    module = parse(TINY)
    module.funcs["forward"].ops[-1].attrs["cap"] = complex(1)  # type: ignore[index]
    assert [str(f) for f in verify(module)] == [
        "@forward: softcap(...)\n    cap: attribute (1+0j) is a complex, want a plain Python value"
    ]
