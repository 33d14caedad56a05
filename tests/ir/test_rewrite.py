"""Rewriting: on text, to text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from effc.errors import EffcError
from effc.ir import Func, Op, dump, parse, parse_func, verify
from effc.ir.rewrite import (
    Names,
    inline,
    match_chain,
    match_op,
    names_of,
    producers,
    prune,
    rename,
    replace_ops,
    substitute,
    topological,
    unroll,
    users,
)  # fmt: skip

TINY = (Path(__file__).parent / "tiny.effc").read_text()

FUNC = """func @f(%x: f32[b,8]) {
  %a: f32[b,8] = silu(%x)
  %b: f32[b,8] = gelu(%a)
  %c, %d: f32[b,4], f32[b,4] = split(%b) {sizes=(4,4)}
  %e: f32[b,8] = lax.mul(%b, %b)
  %idle: f32[b,8] = silu(%e)
  return %c
}
"""


def func(text: str = FUNC) -> Func:
    return parse_func(text)


def lines(made: Func) -> list[str]:
    return [line.strip() for line in dump(made).splitlines()[1:-1]]


def test_fresh_names():
    names = Names(["x", "x.1"])
    assert [names.fresh("x"), names.fresh("x"), names.fresh("y"), names.fresh("y")] == [
        "x.2",
        "x.3",
        "y",
        "y.1",
    ]
    assert names_of(func()).fresh("x") == "x.1"


def test_producers_and_users():
    by, use = producers(func()), users(func())
    assert (by["c"], by["d"], "x" in by) == (by["d"], by["c"], False)
    assert {name: [op.kind for op in ops] for name, ops in use.items()} == {
        "x": ["silu"], "a": ["gelu"], "b": ["split", "lax.mul"], "c": [], "d": [], "e": ["silu"], "idle": [],
    }  # fmt: skip


def test_substitute_follows_chains_and_results():
    made = substitute(func(), {"b": "a", "a": "x", "c": "d"})
    assert lines(made)[2:4] == [
        "%c, %d: f32[b,4], f32[b,4] = split(%x) {sizes=(4,4)}", "%e: f32[b,8] = lax.mul(%x, %x)",
    ]  # fmt: skip
    assert made.results == ("d",)
    assert substitute(func(), {}) is not None and substitute(func(), {}) == func()


def test_a_circle_of_substitutions_is_refused():
    with pytest.raises(ValueError, match="%b is replaced by itself"):
        substitute(func(), {"a": "b", "b": "a"})


def test_rename_takes_definitions_along_and_can_swap():
    made = rename(func(), {"a": "b", "b": "a", "x": "y"})
    assert dump(made).startswith("func @f(%y: f32[b,8])")
    assert lines(made)[:2] == ["%b: f32[b,8] = silu(%y)", "%a: f32[b,8] = gelu(%b)"]


def test_replace_ops_keeps_drops_and_splices():
    def swap(op: Op) -> list[Op] | None:
        if op.kind == "gelu":
            return [
                replace(op, kind="silu", outputs=(replace(op.out, name="n"),)),
                replace(op, inputs=("n",)),
            ]
        return [] if op.outputs[0].name == "idle" else None

    assert lines(replace_ops(func(), swap)) == [
        "%a: f32[b,8] = silu(%x)", "%n: f32[b,8] = silu(%a)", "%b: f32[b,8] = gelu(%n)",
        "%c, %d: f32[b,4], f32[b,4] = split(%b) {sizes=(4,4)}", "%e: f32[b,8] = lax.mul(%b, %b)",
        "return %c",
    ]  # fmt: skip


def test_prune_drops_what_nobody_reads():
    assert [op.kind for op in prune(func()).ops] == ["silu", "gelu", "split"]
    assert prune(prune(func())) == prune(func())


def test_topological():
    assert topological(func())
    assert not topological(replace(func(), ops=func().ops[::-1]))
    assert not topological(replace(func(), results=("z",)))


def test_match_op_knows_the_defaults_of_the_table():
    by = producers(func())
    assert match_op(by, "b", "gelu", approx="tanh") is by["b"]
    assert match_op(by, "b", "gelu", approx="erf") is None
    assert match_op(by, "b", "silu") is None
    assert match_op(by, "x", "silu") is None
    assert match_op(by, "c", "split", sizes=(4, 4)) is by["c"]


def test_match_chain_goes_up_first_operands():
    by = producers(func())
    assert match_chain(by, "c", "split", "gelu", "silu") == [by["c"], by["b"], by["a"]]
    assert match_chain(by, "c", "split", "silu") is None


CALLER = """effc 1
module @m {
  param @w: 3 * f32[8,8] = "layers_*/w" over (1,7,2)
  param @v: 3 * f32[8,8] = "layers/v"
  param @s: f32[8]
  block @layer(%x: f32[b,8], %c: f32[b,8]) {
    %y: f32[b,8] = linear(%x) [w=@w]
    %z: f32[b,8] = linear(%y) [w=@v]
    %n: f32[b,8] = norm(%z) [scale=@s] {kind=rms, eps=1e-05}
    %r: f32[b,8] = lax.add(%n, %c)
    return %r
  }
  func @f(%x: f32[b,8], %y: f32[b,8]) {
    %o: f32[b,8] = repeat(%x, %y) {block=@layer, times=3}
    %p: f32[b,8] = silu(%o)
    return %p, %o
  }
}
"""


def test_inline_puts_the_ops_of_a_block_in_place_of_the_call():
    module = parse(CALLER)
    caller = module.funcs["f"]
    made = inline(caller, caller.ops[0], module.funcs["layer"])
    assert lines(made) == [
        "%y.1: f32[b,8] = linear(%x) [w=@w]",
        "%z: f32[b,8] = linear(%y.1) [w=@v]",
        "%n: f32[b,8] = norm(%z) [scale=@s] {kind=rms, eps=1e-05}",
        "%r: f32[b,8] = lax.add(%n, %y)",
        "%p: f32[b,8] = silu(%r)",
        "return %p, %r",
    ]


def test_unroll_gives_each_layer_its_parameters():
    made = unroll(parse(CALLER), "f")
    assert verify(made) == []
    assert list(made.funcs) == ["f"]
    assert [op.kind for op in made.funcs["f"].ops] == ["linear", "linear", "norm", "lax.add"] * 3 + ["silu"]
    assert [dump(made).splitlines()[i].strip() for i in (2, 3, 4, 5, 8)] == [
        "param @s: f32[8]",
        'param @w.0: f32[8,8] = "layers_1/w"',
        'param @v.0: f32[8,8] = "layers/v[0]"',
        'param @w.1: f32[8,8] = "layers_3/w"',
        'param @v.2: f32[8,8] = "layers/v[2]"',
    ]
    assert made.funcs["f"].results[1] == made.funcs["f"].ops[-2].out.name


def test_unroll_reaches_regions_and_leaves_the_rest():
    module = parse(
        TINY.replace("f32[4]\n", 'f32[4]\n  param @bias: 3 * f32[4] = "b_*"\n').replace("value=@slopes", "value=@bias")
    )
    made = unroll(module, "forward")
    assert verify(made) == []
    assert sum("value=@bias." in line for line in dump(made).splitlines()) == 3
    assert unroll(made, "forward") == made


OUTER = """  func @g(%x: f32[b,8], %y: f32[b,8]) {
    %o: f32[b,8] = repeat(%x, %y) {block=@outer, times=2}
    return %o
  }
}
"""


def test_unroll_of_blocks_in_blocks():
    inner = CALLER.replace("func @f(", "block @outer(").replace("return %p, %o", "return %p")
    module = parse(inner.removesuffix("}\n") + OUTER)
    assert verify(module) == []
    made = unroll(module, "g")
    assert verify(made) == []
    assert [op.kind for op in made.funcs["g"].ops].count("linear") == 12


def test_unroll_of_nothing():
    with pytest.raises(EffcError, match="unroll: no function is called @forwrd; did you mean 'forward'"):
        unroll(parse(TINY), "forwrd")
