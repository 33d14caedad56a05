"""`repeat` with an order: several layers take one array; arrays of their own stay their own."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.rewrite import unroll
from effc.ir.stream import run
from effc.ir.verify import verify
from effc.weights import Lazy, Store

TEXT = """effc 1
module @m {{
  param @table: f32[7,3]
  param @l.scale: 2 * f32[3]
  param @l.own: {own} * f32[3]
  block @layer(%x: f32[b,t,3]) {{
    %n: f32[b,t,3] = norm(%x) [scale=@l.scale, bias=@l.own] {{kind=rms, eps=1e-05}}
    %y: f32[b,t,3] = lax.add(%x, %n)
    return %y
  }}
  func @forward(%tokens: i32[b,t]) {{
    %x: f32[b,t,3] = embed(%tokens) [table=@table]
    %y: f32[b,t,3] = repeat(%x) {{block=@layer, times={times}, {start}order={order}}}
    %logits: f32[b,t,7] = linear(%y) [w=@table] {{layout=nk}}
    return %logits
  }}
  decode greedy {{ forward=@forward }}
}}
"""


def module(own: int = 4, times: int = 4, start: int = 0, order: str = "(0,1,1,0)"):
    told = f"start={start}, " if start else ""
    return parse(TEXT.format(own=own, times=times, start=told, order=order))


def store(of) -> Store:
    def lazy(name: str) -> Lazy:
        shape = tuple(int(str(size)) for size in of.params[name].type.shape)
        arrays = np.random.default_rng(list(name.encode())).standard_normal((9, *shape)).astype(np.float32)
        return Lazy(of.params[name], lambda i: {"": arrays[i]})

    return Store({name: lazy(name) for name in of.params})


def expected(order: list[int], layers: list[int]) -> np.ndarray:
    arrays = {name: [lazy.read(i)[""] for i in range(9)] for name, lazy in store(module()).items()}
    x = arrays["table"][0][TOKENS]
    for layer in layers:
        scale = arrays["l.scale"][order[layer]]
        x = x + x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * scale + arrays["l.own"][layer]
    return x @ arrays["table"][0].T


TOKENS = np.array([[1, 2, 3, 4]])


def test_layers_take_the_arrays_that_the_order_names_and_their_own():
    made = module()
    got = run(made, store(made), jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, expected([0, 1, 1, 0], [0, 1, 2, 3]), rtol=1e-5, atol=1e-5)


def test_start_and_times_cut_the_order():
    made = module(times=2, start=1)
    got = run(made, store(made), jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, expected([0, 1, 1, 0], [1, 2]), rtol=1e-5, atol=1e-5)


def test_text_round_trip():
    made = module()
    assert "order=(0,1,1,0)" in dump(made)
    assert parse(dump(made)) == made


def test_unrolled_layers_read_what_the_order_names():
    flat = unroll(module(), "forward")
    norms = [op.params for op in flat.funcs["forward"].ops if op.kind == "norm"]
    assert [params["scale"] for params in norms] == [f"l.scale.{i}" for i in (0, 1, 1, 0)]
    assert [params["bias"] for params in norms] == [f"l.own.{i}" for i in range(4)]
    assert not verify(flat)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"order": "(0,1,1)"}, "order tells the arrays of 3 layers, want 4"),
        ({"order": "(0,1,1,2)"}, "order names array 2, but @l.scale in @layer is stacked 2 times"),
        ({"order": "(0,1,-1,0)"}, "want numbers of 0 or more"),
        ({"own": 1}, "order names array 1, but @l.own in @layer is stacked 1 times"),
    ],
)
def test_faults(change, told):
    assert any(told in str(fault) for fault in verify(module(**change)))
