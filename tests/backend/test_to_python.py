"""Emitted programs: their text, that they compute what the interpreter does, and that they decode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.ir.parser import parse
from effc.runtime.generate import generate

TINY = Path(__file__).parent.parent / "runtime" / "tiny.effc"
TOKENS = np.random.default_rng(0).integers(0, 12, (2, 11)).astype(np.int32)

Make = Callable[[str], Any]


def module(forward: str, *, params: str = "", blocks: str = "", meta: str = "") -> str:
    """Text of a module whose embedding is [12,8]; `forward` goes from %x: f32[b,t,8] to %y: f32[b,t,8]."""
    return f"""effc 1
module @small {{
  meta {{ vocab = 12{meta} }}
  param @embed: f32[12,8]
  {params}
  {blocks}
  func @forward(%tokens: i32[b,t]) {{
    %x: f32[b,t,8] = embed(%tokens) [table=@embed]
    {forward}
    %logits: f32[b,t,12] = linear(%y) [w=@embed] {{layout=nk}}
    return %logits
  }}
  decode greedy {{ forward=@forward }}
}}
"""


def agree(made: Any, *, steps: bool = True) -> None:
    """Emitted is interpreted, and any chunking is the whole; logits are sums of 8 terms near 1, in f32."""
    want = made.interpreted(TOKENS)
    np.testing.assert_allclose(made.forward(TOKENS), want, atol=1e-5)
    if steps:
        np.testing.assert_allclose(made.in_steps(TOKENS, [4, 1, 1, 5]), want, atol=1e-5)


def test_a_program_reads_like_one_a_person_wrote(golden: Callable[..., None]) -> None:
    golden(emit(parse(TINY.read_text()), version="0.1", pipeline="clean,fuse"))


def test_it_computes_what_the_interpreter_does(emitted: Make) -> None:
    agree(emitted(TINY.read_text()))


def test_emitting_is_a_function_of_the_module() -> None:
    assert emit(parse(TINY.read_text())) == emit(parse(TINY.read_text()))


ATTENTION = """
%q: f32[b,t,2,4] = lax.reshape(%x) {new_sizes=(b,t,2,4)}
%k: f32[b,t,1,8] = lax.reshape(%x) {new_sizes=(b,t,1,8)}
%k1, %v1: f32[b,t,1,4], f32[b,t,1,4] = split(%k) {sizes=(4,4)}
"""


def test_a_bias_region_is_a_local_function(emitted: Make) -> None:
    made = emitted(
        module(
            ATTENTION
            + """
            %a: f32[b,t,2,4] = attention(%q, %k1, %v1) {scale=0.5, window=6}
              bias(%i: i32[], %j: i32[], %h: i32[]) {
              %far: i32[] = lax.sub(%j, %i)
              %slope: f32[] = lax.convert_element_type(%far) {dtype=f32}
              %head: f32[] = lax.convert_element_type(%h) {dtype=f32}
              %half: f32[] = const() {value=0.25}
              %scaled: f32[] = lax.mul(%slope, %half)
              %r: f32[] = lax.mul(%scaled, %head)
              return %r
            }
            %y: f32[b,t,8] = lax.reshape(%a) {new_sizes=(b,t,8)}
            """
        )
    )
    assert "def a_bias(i, j, h):" in made.source and "scaled = slope * 0.25" in made.source
    agree(made)


def test_a_window_keeps_inputs_and_runs_again(emitted: Make) -> None:
    made = emitted(
        module(
            """
            %y: f32[b,t,8] = window(%x) {why="running mean"} body(%w: f32[b,t,8]) {
              %sum: f32[b,t,8] = lax.cumsum(%w) {axis=1}
              %pos: i32[b,t] = positions(%w)
              %float: f32[b,t] = lax.convert_element_type(%pos) {dtype=f32}
              %one: f32[] = const() {value=1.0}
              %count: f32[b,t] = lax.add(%float, %one)
              %wide: f32[b,t,8] = lax.broadcast_in_dim(%count) {shape=(b,t,8), dims=(0,1)}
              %mean: f32[b,t,8] = lax.div(%sum, %wide)
              return %mean
            }
            """
        )
    )
    want = made.forward(TOKENS)
    np.testing.assert_allclose(made.in_steps(TOKENS, [4, 1, 6]), want, atol=1e-5)
    x = np.asarray(made.engine.params["embed"])[TOKENS]
    mean = x.cumsum(1) / np.arange(1, 12)[None, :, None]
    np.testing.assert_allclose(want, mean @ np.asarray(made.engine.params["embed"]).T, atol=1e-5)
    prompts = [[1, 2, 3, 4, 5], [7]]
    alone = [generate(made.engine, [prompt], max_new_tokens=5).tokens[0] for prompt in prompts]
    assert generate(made.engine, prompts, max_new_tokens=5).tokens == alone


def test_a_scan_over_features_takes_its_body_as_a_function(emitted: Make) -> None:
    made = emitted(
        module(
            """
            %f: f32[8,b,t] = lax.transpose(%x) {permutation=(2,0,1)}
            %zero: f32[b,t] = const() {value=0.0}
            %last, %all: f32[b,t], f32[8,b,t] = lax.scan(%zero, %f) {
              consts=0, carry=1, length=8, reverse=false}
              body(%c: f32[b,t], %e: f32[b,t]) {
              %s: f32[b,t] = lax.add(%c, %e)
              return %s, %s
            }
            %y: f32[b,t,8] = lax.transpose(%all) {permutation=(1,2,0)}
            """
        )
    )
    assert "jnp.full((b, t), 0.0, jnp.float32)" in made.source
    agree(made)


def test_rows_are_dropped_after_the_last_op_that_looks_back(emitted: Make) -> None:
    made = emitted(TINY.read_text())
    body = made.source[made.source.index("def extend") : made.source.index("def forward")].splitlines()
    assert body.index("    x1 = step.last(x1)") == body.index("        x1 = layer(p, x1, cos, sin, step)") + 1
    logits, cache = made.engine.extend(jnp.asarray(TOKENS), made.engine.empty(2, 128), jnp.array([11, 4]))
    want = made.interpreted(TOKENS)
    np.testing.assert_allclose(logits[:, 0], want[[0, 1], [10, 3]], atol=1e-5)
    assert cache.lengths.tolist() == [11, 4]


def test_where_tokens_are_merged_only_logits_are_dropped(emitted: Make) -> None:
    made = emitted(
        module(
            """
            %pos: i32[b,t] = positions(%tokens)
            %flat: f32[b*t,8] = lax.reshape(%x) {new_sizes=(b*t,8)}
            %p1: i32[b*t] = lax.reshape(%pos) {new_sizes=(b*t,)}
            %p2: i32[b*t,8] = lax.broadcast_in_dim(%p1) {shape=(b*t,8), dims=(0,)}
            %p3: f32[b*t,8] = lax.convert_element_type(%p2) {dtype=f32}
            %z: f32[b*t,8] = lax.add(%flat, %p3)
            %q: f32[b,t,2,4] = lax.reshape(%z) {new_sizes=(b,t,2,4)}
            %a: f32[b,t,2,4] = attention(%q, %q, %q) {scale=0.5}
            %y1: f32[b*t,8] = lax.reshape(%a) {new_sizes=(b*t,8)}
            %y2: f32[b*t,8] = lax.mul(%y1, %z)
            %y: f32[b,t,8] = lax.reshape(%y2) {new_sizes=(b,t,8)}
            """
        )
    )
    assert "logits = step.last(logits)" in made.source and "reshape(b*t, 8)" in made.source
    agree(made)


def test_a_block_without_tokens_behind_it_gets_no_step(emitted: Make) -> None:
    made = emitted(
        module(
            "%y: f32[b,t,8] = repeat(%x) {block=@mlp, times=3}",
            params="param @w: 3 * f32[8,8]\n  param @shared: f32[8]",
            blocks="""
            block @mlp(%x: f32[b,t,8]) {
              %n: f32[b,t,8] = norm(%x) [scale=@shared] {kind=rms, eps=1e-06}
              %y: f32[b,t,8] = linear(%n) [w=@w]
              return %y
            }""",
        )
    )
    assert "y = mlp(p, params, y)" in made.source and '"w": "3 * f32[8,8] = w"' in made.source
    agree(made)


def test_two_values_are_carried_round_a_loop(emitted: Make) -> None:
    made = emitted(
        module(
            """
            %y, %z: f32[b,t,8], f32[b,t,8] = repeat(%x, %x) {block=@swap, times=3, carry=2}
            """,
            blocks="""
            block @swap(%u: f32[b,t,8], %v: f32[b,t,8]) {
              %s: f32[b,t,8] = lax.add(%u, %v)
              return %v, %s
            }""",
        )
    )
    assert "for _ in range(3):\n        y, z = swap(y, z)" in made.source
    agree(made)


def test_names_that_python_or_the_program_has_are_altered(emitted: Make) -> None:
    made = emitted(
        module(
            """
            %class: f32[b,t,8] = silu(%x)
            %norm: f32[b,t,8] = lax.exp(%class)
            %3: f32[b,t,8] = norm(%norm) {kind=layer, eps=1e-05}
            %step: f32[b,t,8] = lax.neg(%3)
            %y: f32[b,t,8] = lax.max(%step, %x)
            """
        )
    )
    assert "class_ = silu(x)" in made.source and "norm_ = lax.exp(class_)" in made.source
    agree(made)


def test_result_dtypes_are_kept(emitted: Make) -> None:
    made = emitted(
        module(
            """
            %h: bf16[b,t,8] = lax.convert_element_type(%x) {dtype=bf16}
            %n: f32[b,t,8] = norm(%h) {kind=rms, eps=1e-06}
            %y: f32[b,t,8] = lax.add(%n, %x)
            """
        )
    )
    assert 'norm(h, kind="rms", eps=1e-06, dtype=jnp.float32)' in made.source
    agree(made)


def test_what_a_dump_says_cannot_become_code() -> None:
    text = module("%y: f32[b,t,8] = silu(%x)", meta=', source = "x\\"\\"\\"\\nimport os\\n\\"\\"\\"\\\\"')
    space: dict[str, Any] = {"__name__": "x"}
    exec(emit(parse(text)), space)
    assert "os" not in space and '"""' in space["__doc__"]


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            "%y: f32[b,t,8] = sillu(%x)",
            "@forward: %y: the emitter has no Python for 'sillu'; did you mean 'silu'?",
        ),
        (
            "%y: f32[b,t,8] = lax.reshap(%x) {new_sizes=(b,t,8)}",
            "no primitive 'reshap'; did you mean 'reshape'?",
        ),
        ("%y: f32[b,t,8] = linear(%x) [w=@embd]", "no parameter @embd; did you mean 'embed'?"),
        ("%y: f32[b,t,8] = repeat(%x) {block=@layr, times=2}", "@forward runs @layr, want a block or a func"),
        ("%y: f32[b,t,8] = lax.reshape(%x) {new_sizes=(b,t,k)}", "the size k depends on more than b and t"),
    ],
)
def test_what_has_no_python_is_refused(forward: str, message: str) -> None:
    with pytest.raises(EffcError) as error:
        emit(parse(module(forward)))
    assert message in str(error.value)


def test_lines_are_short() -> None:
    assert max(map(len, emit(parse(TINY.read_text())).splitlines())) <= 110


def test_a_loaded_program_says_its_context() -> None:
    assert load_program(emit(parse(TINY.read_text()))).context == 200
    assert load_program(emit(parse(module("%y: f32[b,t,8] = silu(%x)")))).context is None
