"""fuse: what is joined, what is left alone and why, and that logits stay."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from effc.ir.interpret import Context, evaluate_func
from effc.ir.parser import parse
from effc.ir.printer import op_line
from effc.ir.stream import weight
from effc.passes import Fuse, runner

HEAD = "effc 1 module @m { "
BODY = "func @forward(%x: f32[b,t,8]) {{ {} return %y }} }}"


def module(params: str, body: str):
    return parse(HEAD + params + " " + BODY.format(body))


TWO = "%p: f32[b,t,6] = linear(%x) [w=@a] %q: f32[b,t,6] = linear(%x) [w=@b] %y: f32[b,t,6] = lax.mul(%p, %q)"
TWO_NK = TWO.replace("@a]", "@a] {layout=nk}").replace("@b]", "@b] {layout=nk}")

CASES = {
    "joined": ("param @a: f32[8,6] param @b: f32[8,6]", TWO, ["a_b"], []),
    "joined nk": ("param @a: f32[6,8] param @b: f32[6,8]", TWO_NK, ["a_b"], []),
    "named by what differs": (
        "param @l.a.kernel: f32[8,6] param @l.b.kernel: f32[8,6]",
        TWO.replace("@a", "@l.a.kernel").replace("@b", "@l.b.kernel"),
        ["l.a_b.kernel"],
        [],
    ),
    "one bias of two": (
        "param @a: f32[8,6] param @b: f32[8,6] param @c: f32[6]",
        TWO.replace("[w=@b]", "[w=@b, bias=@c]"),
        ["a_b", "a_b.bias"],
        [],
    ),
    "odd widths": (
        "param @a: f32[8,5] param @b: f32[8,5]",
        TWO.replace("b,t,6", "b,t,5"),
        ["a_b"],
        [],
    ),
    "shared": (
        "param @a: f32[8,6] param @b: f32[8,6]",
        TWO.replace("%y:", "%r: f32[b,t,6] = linear(%x) [w=@a] %s: f32[b,t,6] = lax.add(%p, %r) %y:").replace(
            "lax.mul(%p", "lax.mul(%s"
        ),
        ["a", "b"],
        [("a", "read by other ops too, so it stays by itself")] * 2,
    ),
    "two dtypes": (
        "param @a: f32[8,6] param @b: bf16[8,6]",
        TWO,
        ["a", "b"],
        [
            ("a", "reads what others read, but is f32 kn f32 and they are not"),
            ("b", "reads what others read, but is bf16 kn f32 and they are not"),
        ],
    ),
    "norm folded": (
        "param @s: f32[8] param @a: f32[8,6]",
        "%n: f32[b,t,8] = norm(%x) [scale=@s] {kind=rms, eps=1e-05} %y: f32[b,t,6] = linear(%n) [w=@a]",
        ["a"],
        [],
    ),
    "norm with offset and bias folded": (
        "param @s: f32[8] param @c: f32[8] param @a: f32[6,8]",
        "%n: f32[b,t,8] = norm(%x) [scale=@s, bias=@c] {kind=layer, eps=1e-05, offset=1.0} "
        "%y: f32[b,t,6] = linear(%n) [w=@a] {layout=nk}",
        ["a", "a.bias"],
        [],
    ),
    "norm bias onto a bias": (
        "param @s: f32[8] param @c: f32[8] param @a: f32[8,6] param @d: f32[6]",
        "%n: f32[b,t,8] = norm(%x) [scale=@s, bias=@c] {kind=layer, eps=1e-05} "
        "%y: f32[b,t,6] = linear(%n) [w=@a, bias=@d]",
        ["a", "d"],
        [],
    ),
    "norm read by another op": (
        "param @s: f32[8] param @a: f32[8,8]",
        "%n: f32[b,t,8] = norm(%x) [scale=@s] {kind=rms, eps=1e-05} %p: f32[b,t,8] = linear(%n) [w=@a] "
        "%y: f32[b,t,8] = lax.add(%n, %p)",
        ["s", "a"],
        [("s", "the norm is read by 'lax.add', not by linears alone")],
    ),
    "norm before a shared matrix": (
        "param @s: f32[8] param @a: f32[8,8]",
        "%n: f32[b,t,8] = norm(%x) [scale=@s] {kind=rms, eps=1e-05} %p: f32[b,t,8] = linear(%n) [w=@a] "
        "%y: f32[b,t,8] = linear(%p) [w=@a]",
        ["s", "a"],
        [("s", "a or its bias is read by other ops too")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, random_store, apply) -> None:
    params, body, names, skips = CASES[case]
    before = module(params, body)
    store = random_store(before)
    after, arrays, (step,) = apply(before, store, "fuse")
    assert sorted(after.params) == sorted(names)
    assert step.notes.skips == skips
    wanted, got = _run(before, store), _run(after, arrays)
    assert np.max(np.abs(wanted - got)) <= 1e-5 * np.ptp(wanted)


def _run(module, store) -> np.ndarray:
    """The function on fixed values f32[2,3,8]."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 8)), jnp.float32)
    weights = {name: weight(store[name], 0) for name in module.params}
    context = Context({"b": 2, "t": 3}, jnp.zeros((2, 3), jnp.int32))
    return np.asarray(evaluate_func(module.forward(), [x], weights, context)[0])


@pytest.mark.parametrize("passes", ["fuse", "fuse{norms=false}"])
def test_logits_stay_and_parts_are_gone(passes: str, tiny, random_store, apply, logits) -> None:
    store = random_store(tiny)
    after, arrays, _ = apply(tiny, store, passes)
    wanted = logits(tiny, store)
    assert np.max(np.abs(wanted - logits(after, arrays))) <= 1e-5 * np.ptp(wanted)
    assert "layers.attn.q_k_v" in after.params
    assert "layers.attn.q" not in after.params


@pytest.mark.parametrize("passes", ["quant4", "quant8", "quant4{sym=false,group=16}"])
def test_coded_weights_join_without_a_change(passes: str, tiny, random_store, apply, logits) -> None:
    store = random_store(tiny)
    alone = apply(tiny, store, f"{passes}")
    joined = apply(tiny, store, f"{passes},fuse")
    assert "layers.mlp.gate_up" in joined[0].params
    np.testing.assert_allclose(logits(*alone[:2]), logits(*joined[:2]), atol=1e-5)


def test_codes_of_odd_widths_meet_inside_a_byte(random_store, apply) -> None:
    before = module("param @a: f32[8,33] param @b: f32[8,33]", TWO.replace("b,t,6", "b,t,33"))
    store = random_store(before)
    alone, joined = apply(before, store, "quant4{group=4}"), apply(before, store, "quant4{group=4},fuse")
    assert list(joined[0].params) == ["a_b"]
    np.testing.assert_allclose(_run(*alone[:2]), _run(*joined[:2]), atol=1e-6)


def test_the_linear_stands_where_the_first_stood() -> None:
    after = runner.step(Fuse(), module("param @a: f32[8,6] param @b: f32[8,6]", TWO)).after
    assert [op_line(op) for op in after.forward().ops] == [
        "%p_q: f32[b,t,12] = linear(%x) [w=@a_b]",
        "%p, %q: f32[b,t,6], f32[b,t,6] = split(%p_q) {sizes=(6,6)}",
        "%y: f32[b,t,6] = lax.mul(%p, %q)",
    ]
