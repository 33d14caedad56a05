"""clean: each rule by itself, as text before and after."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.ir.core import Op, Value
from effc.ir.interpret import Context, evaluate_func
from effc.ir.parser import parse, parse_func
from effc.ir.printer import op_line
from effc.ir.types import Type
from effc.passes import Clean, Notes, runner
from effc.passes.fold_const import folded

CASES = {
    "fold": (
        "%a: f32[] = const() {value=2.0} %b: f32[] = const() {value=0.5} %c: f32[] = lax.mul(%a, %b) "
        "%d: f32[] = lax.sqrt(%a) %e: f32[] = lax.add(%c, %d) %y: f32[b,t,4] = lax.mul(%x, %e)",
        ["%e: f32[] = const() {value=2.4142136573791504}", "%y: f32[b,t,4] = lax.mul(%x, %e)"],
    ),
    "exp is left to the machine": (
        "%a: f32[] = const() {value=2.0} %b: f32[] = lax.exp(%a) %y: f32[b,t,4] = lax.mul(%x, %b)",
        ["%a: f32[] = const() {value=2.0}", "%b: f32[] = lax.exp(%a)", "%y: f32[b,t,4] = lax.mul(%x, %b)"],
    ),
    "merge": (
        "%a: f32[b,t,4] = silu(%x) %b: f32[b,t,4] = silu(%x) %y: f32[b,t,4] = lax.mul(%a, %b)",
        ["%a: f32[b,t,4] = silu(%x)", "%y: f32[b,t,4] = lax.mul(%a, %a)"],
    ),
    "different attributes are not merged": (
        "%a: f32[b,t,4] = gelu(%x) {approx=erf} %b: f32[b,t,4] = gelu(%x) %y: f32[b,t,4] = lax.mul(%a, %b)",
        ["%a: f32[b,t,4] = gelu(%x) {approx=erf}", "%b: f32[b,t,4] = gelu(%x)",
         "%y: f32[b,t,4] = lax.mul(%a, %b)"],
    ),
    "dead": ("%a: f32[b,t,4] = silu(%x) %y: f32[b,t,4] = gelu(%x)", ["%y: f32[b,t,4] = gelu(%x)"]),
    "no-op shapes": (
        "%a: f32[b,t,4] = lax.reshape(%x) {new_sizes=(b,t,4)} "
        "%c: f32[b,t,4] = lax.transpose(%a) {permutation=(0,1,2)} "
        "%d: f32[b,t,4] = lax.convert_element_type(%c) {new_dtype=f32} %y: f32[b,t,4] = silu(%d)",
        ["%y: f32[b,t,4] = silu(%x)"],
    ),
    "a real transpose stays": (
        "%a: f32[t,b,4] = lax.transpose(%x) {permutation=(1,0,2)} "
        "%y: f32[b,t,4] = lax.transpose(%a) {permutation=(1,0,2)}",
        ["%a: f32[t,b,4] = lax.transpose(%x) {permutation=(1,0,2)}",
         "%y: f32[b,t,4] = lax.transpose(%a) {permutation=(1,0,2)}"],
    ),
    "times one, plus zero": (
        "%i: f32[] = const() {value=1.0} %o: f32[] = const() {value=0.0} %a: f32[b,t,4] = lax.mul(%i, %x) "
        "%c: f32[b,t,4] = lax.sub(%a, %o) %y: f32[b,t,4] = silu(%c)",
        ["%y: f32[b,t,4] = silu(%x)"],
    ),
    "zero minus x is not x": (
        "%o: f32[] = const() {value=0.0} %y: f32[b,t,4] = lax.sub(%o, %x)",
        ["%o: f32[] = const() {value=0.0}", "%y: f32[b,t,4] = lax.sub(%o, %x)"],
    ),
    "equal literals of two kinds stay two": (
        "%i: f32[] = const() {value=0.0} %o: f32[] = const() {value=-0.0} %a: f32[b,t,4] = lax.div(%x, %i) "
        "%c: f32[b,t,4] = lax.div(%x, %o) %y: f32[b,t,4] = lax.max(%a, %c)",
        ["%i: f32[] = const() {value=0.0}", "%o: f32[] = const() {value=-0.0}",
         "%a: f32[b,t,4] = lax.div(%x, %i)",
         "%c: f32[b,t,4] = lax.div(%x, %o)", "%y: f32[b,t,4] = lax.max(%a, %c)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rule(case: str) -> None:
    body, wanted = CASES[case]
    module = parse(f"effc 1 module @m {{ func @forward(%x: f32[b,t,4]) {{ {body} return %y }} }}")
    after = runner.step(Clean(), module).after
    assert [op_line(op) for op in after.forward().ops] == wanted


def test_unused_parameters_and_functions_go_with_a_word_each(tiny) -> None:
    extra = parse(
        "effc 1 module @m { param @idle: f32[4] param @far: f32[4,4] "
        "func @other(%x: f32[b,t,4]) { %y: f32[b,t,4] = linear(%x) [w=@far] return %y } }"
    )
    more = tiny.with_params(*extra.params.values()).with_func(extra.funcs["other"])
    step = runner.step(Clean(), more)
    assert step.after == tiny
    assert step.notes.choices == [
        "1 of 27 ops dropped, folded or merged",
        "2 unused parameters dropped: idle, far",
    ]


def test_nothing_to_do_is_said(tiny) -> None:
    step = runner.step(Clean(), tiny)
    assert step.after == tiny
    assert step.notes == Notes(skips=[("module", "nothing to fold, merge or drop")])


KINDS = ["lax.add", "lax.sub", "lax.mul", "lax.div", "lax.max", "lax.min"]


@settings(deadline=None)
@given(
    st.sampled_from(KINDS),
    st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)
def test_folding_is_what_the_machine_computes(kind: str, a: float, b: float) -> None:
    scalar = Type("f32", ())
    value = folded(Op(kind, ("a", "b"), (Value("c", scalar),)), [a, b], [scalar, scalar])
    text = f"%a: f32[] = const() {{value={a!r}}} %b: f32[] = const() {{value={b!r}}} %c: f32[] = {kind}(%a, %b)"
    machine = np.float32(_computed(f"func @c() {{ {text} return %c }}"))
    assert np.array_equal(np.float32(value), machine, equal_nan=True) or _denormal(machine)  # type: ignore[arg-type]


def _computed(text: str) -> float:
    (value,) = evaluate_func(parse_func(text), (), {}, Context({}, jnp.zeros((1, 1), jnp.int32)))
    return float(value)


def _denormal(value: np.float32) -> bool:
    """Machines may flush what is smaller than the smallest normal number."""
    return abs(float(value)) < 1.2e-38


def test_logits_stay(tiny, random_store, apply, logits) -> None:
    store = random_store(tiny)
    after, arrays, _ = apply(tiny, store, "clean")
    assert np.array_equal(logits(tiny, store), logits(after, arrays))
