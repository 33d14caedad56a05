"""The IR's text: canonical dumps, what else the parser takes, and the text of its errors."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effc.errors import EffcError
from effc.ir import NAN, Dim, Func, Loc, Module, Ref, Type, dump, parse, parse_func, parse_type
from effc.ir.types import Quant, name_dim

TINY = (Path(__file__).parent / "tiny.effc").read_text()


def attrs(text: str) -> dict[str, object]:
    """Attributes of an op spelled `{text}`."""
    func = parse_func(f"func @f() {{ () = op() {{{text}}} return }}")
    return dict(func.ops[0].attrs)


def test_the_dump_of_a_canonical_text_is_that_text():
    assert dump(parse(TINY)) == TINY


def test_spaces_line_ends_and_comments_mean_nothing():
    loose = TINY.replace("\n", " # note\n\n\t").replace(", ", " ,").replace("{kind", "{ kind")
    assert parse(loose) == parse(TINY)


def test_a_function_by_itself():
    func = parse(TINY).funcs["layer"]
    assert isinstance(func, Func)
    assert dump(func).startswith("block @layer(%x: f32[b,t,64]")
    assert parse_func(dump(func)) == func


def test_an_empty_module():
    assert parse("effc 1 module @m { }") == Module("m")
    assert dump(Module("m")) == "effc 1\nmodule @m {\n}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-3", -3), ("1e-05", 1e-05), ("-2.5", -2.5), ("1.", 1.0), ("inf", math.inf),
        ("-inf", -math.inf), ("nan", NAN), ("true", True), ("false", False), ("none", None),
        ("rms", "rms"), ("lax.add", "lax.add"), ("info", "info"), ("nan_ok", "nan_ok"), ('"b"', "b"),
        ('"none"', "none"), ('"a\\n\\"é\\""', 'a\n"é"'), ("b", name_dim("b")), ("2*b", name_dim("b") * 2),
        ("-b", -name_dim("b")),
        ("-b*t", -name_dim("b") * name_dim("t")), ("inf/2", parse_type("f32[inf/2]").shape[0]),
        ("1*batch", name_dim("batch")), ("b-1", name_dim("b") - 1),
        ("3*b*t^2/2-t+1", parse_type("f32[3*b*t^2/2-t+1]").shape[0]), ("4-1", 3), ("()", ()), ("(1,)", (1,)),
        ("(1)", (1,)), ("(1,(b,none),)", (1, (name_dim("b"), None))), ("@x", Ref("x")),
        ('@"x y"', Ref("x y")), ("f32[]", Type("f32", ())), ("f32", "f32"),
        ("q4{group=32}[64,8]", Type(Quant(4, 32), (64, 8))),
    ],
)  # fmt: skip
def test_attribute_values(text: str, value: object):
    (found,) = attrs(f"x={text}").values()
    assert (type(found), found) == (type(value), value) or found is value


def test_one_nan_for_all():
    assert attrs("x=nan")["x"] is NAN
    assert attrs("x=(nan,-nan)") == attrs("x=(nan,nan)")


def test_true_and_one_stay_apart():
    assert dump(parse_func("func @f() { () = op() {a=true, b=1, c=1.0} return }")).count("a=true, b=1, c=1.0")


@pytest.mark.parametrize(
    ("text", "quant"),
    [
        ("q4{group=32,sym,scale=f16}[64,8]", Quant(4, 32, True, "f16")),
        ("q8{channel,asym,axis=-1}[64,8]", Quant(8, 0, False, axis=-1)),
        ("q4{ axis=-1, group=64 }[64,8]", Quant(4, 64, axis=-1)),
    ],
)
def test_quantized_types(text: str, quant: Quant):
    type = parse_type(text)
    assert type == Type(quant, (64, 8))
    assert parse_type(str(type)) == type


def test_formulas_of_sizes():
    b, t = name_dim("b"), name_dim("t")
    (size,) = parse_type("i32[t*2*b + 1 - b]").shape
    assert size == 2 * b * t + 1 - b
    assert isinstance(size, Dim) and str(size) == "-b+2*b*t+1"


def test_locations_are_shown_on_demand_and_read_back():
    text = 'func @f(%x: f32[]) {\n  %y: f32[] = silu(%x) at "a/b.py:3 in layers_0/mlp"\n  return %y\n}\n'
    func = parse_func(text)
    assert func.ops[0].loc == Loc("layers_0/mlp", "a/b.py", 3)
    assert dump(func, locs=True) == text
    assert " at " not in dump(func)
    assert parse_func(dump(func)) == func


@pytest.mark.parametrize("loc", [Loc("m/q"), Loc("", "f.py", 7), Loc("m in n", "C:/f.py", 7)])
def test_every_location_reads_back(loc: Loc):
    func = parse_func(f'func @f() {{ () = op() at "{loc}" return }}')
    assert func.ops[0].loc == loc


ERRORS = {
    "a missing comma": (
        TINY.replace("%cos, %sin: f32[b,t,8], f", "%cos %sin: f32[b,t,8], f"),
        "m.effc:41:10: unexpected '%sin', want ',' or ':'\n"
        "        %cos %sin: f32[b,t,8], f32[b,t,8] = rope_table(%pos) {dims=16, theta=10000.0}\n"
        "             ^",
    ),
    "no bracket": (
        "effc 1\nmodule @m {\n  block @layer(%x: f32[b,t,64] %y: f32[]) {",
        "m.effc:3:32: unexpected '%y', want ')' or ','\n"
        "      block @layer(%x: f32[b,t,64] %y: f32[]) {\n"
        "                                   ^",
    ),
    "no header": (
        "\nmodule @m {}",
        "m.effc:2:1: no header, want 'effc 1' first\n    module @m {}\n    ^",
    ),
    "a later version": (
        "effc 2\nmodule @m { anything }",
        "m.effc:1:6: IR version 2, want 1\n    effc 2\n         ^",
    ),
    "a module cut short": (
        "effc 1\nmodule @m {\n  param @w: f32[2]\n",
        "m.effc:3:19: unexpected end of text, want '=', '}', 'block', 'decode', 'func', 'meta', 'over', "
        "'param' or 'perm'\n      param @w: f32[2]\n                      ^",
    ),
    "a function twice": (
        "effc 1\nmodule @m { func @f() { return } block @f() { return } }",
        "m.effc:2:40: '@f' is given twice, want each name once\n"
        "    module @m { func @f() { return } block @f() { return } }\n" + " " * 43 + "^",
    ),
    "an attribute twice": (
        "effc 1\nmodule @m { func @f() { () = op() {a=1, a=2} return } }",
        "m.effc:2:41: 'a' is given twice, want each name once\n"
        "    module @m { func @f() { () = op() {a=1, a=2} return } }\n" + " " * 44 + "^",
    ),
    "two decodes": (
        "effc 1\nmodule @m {\n  decode greedy\n  decode greedy\n}",
        "m.effc:4:3: a second decode, want one\n      decode greedy\n      ^",
    ),
    "values without types": (
        "effc 1\nmodule @m { func @f() { %a, %b: f32[] = op() return } }",
        "m.effc:2:25: 2 values and 1 types, want a type for each value\n"
        "    module @m { func @f() { %a, %b: f32[] = op() return } }\n" + " " * 28 + "^",
    ),
    "an empty size": (
        "effc 1\nmodule @m { param @w: f32[2,,3] }",
        "m.effc:2:29: unexpected ',', want '-', a whole number or a word\n"
        "    module @m { param @w: f32[2,,3] }\n" + " " * 32 + "^",
    ),
    "a setting of a quantized type": (
        "effc 1\nmodule @m { param @w: q4{grup=32}[64,2] }",
        "m.effc:2:26: quantization setting 'grup', want channel or group=N, sym or asym, scale=DTYPE, "
        "axis=N; did you mean 'group'?\n    module @m { param @w: q4{grup=32}[64,2] }\n" + " " * 29 + "^",
    ),
    "a string with a bad escape": (
        'effc 1\nmodule @m { param @w: f32[2] = "a\\q" }',
        'm.effc:2:34: in the string: Invalid \\escape\n    module @m { param @w: f32[2] = "a\\q" }\n'
        + " " * 37 + "^",
    ),
    "a division by zero": (
        "effc 1\nmodule @m { param @w: f32[b/0] }",
        "m.effc:2:29: division by 0\n    module @m { param @w: f32[b/0] }\n" + " " * 32 + "^",
    ),
    "over of two": (
        "effc 1\nmodule @m { param @w: f32[2] over (0,2) }",
        "m.effc:2:19: over is (0, 2), want (start,stop,step)\n"
        "    module @m { param @w: f32[2] over (0,2) }\n" + " " * 22 + "^",
    ),
    "a character of no use": (
        "effc 1\nmodule @m { ; }",
        "m.effc:2:13: unexpected ';', want '}', 'block', 'decode', 'func', 'meta' or 'param'\n"
        "    module @m { ; }\n" + " " * 16 + "^",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_error_texts(case: str):
    text, message = ERRORS[case]
    with pytest.raises(EffcError) as caught:
        parse(text, file="m.effc")
    assert str(caught.value) == message


def test_what_the_text_cannot_hold_is_refused():
    func = parse_func("func @f() { () = op() {a=1} return }")
    func.ops[0].attrs["a"] = [1]  # type: ignore[index]
    with pytest.raises(EffcError, match=r"attribute \[1\] is a list, want a plain Python value"):
        dump(func)


def test_five_thousand_ops_are_read_quickly():
    line = (
        "%x{0}: f32[b,t,{1},64] = lax.dot_general(%x{2}, %x0) "
        "{{contract=((2,),(0,)), new_sizes=(b,t,9,64), eps=1e-05}}\n"
    )
    body = "".join(line.format(i + 1, 500 + i % 50, i) for i in range(5000))
    text = f"effc 1 module @m {{ func @f(%x0: f32[]) {{\n{body} return %x5000 }} }}"
    start = time.process_time()
    parse(text)
    assert time.process_time() - start < 4  # half of that on an idle machine


def test_no_jax_and_no_parser_until_needed():
    code = "import sys, effc.ir; print([m for m in ('jax', 'numpy', 'lark') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
