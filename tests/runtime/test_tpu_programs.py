"""Whole programs with TPU kernels in them, run in interpret mode, against the same programs without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from effc.backend.to_python import emit, load_program
from effc.ir.parser import parse
from effc.passes import runner
from effc.pipeline import Pipeline
from effc.runtime import exits, layers
from effc.runtime.cache import Cache, Rows, Step, cache_shapes, empty_cache, write
from effc.runtime.coded import Split
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.attention import append, choice, reference, tpu
from effc.runtime.recursion import Gathered
from effc.runtime.weights import parse_spec

HERE = Path(__file__).parent
TINY = (HERE / "tiny.effc").read_text()
ROUTED = (HERE.parent / "passes" / "tiny.effc").read_text()
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 32, (2, 24)), jnp.int32)
CLOSE = 3e-3
"""An int8 cache: digits of 14 bits, through three layers."""

Extend = Callable[..., Any]


HOW = [pytest.param(True, marks=pytest.mark.slow), False]
"""Kernels in interpret mode, or their references, which compile in a fraction of the time."""


@contextmanager
def forced(monkeypatch: pytest.MonkeyPatch, interpret: bool = True) -> Iterator[list[on_tpu.Call]]:
    """What is traced inside runs the kernels, in interpret mode, or their references in their place."""

    def taken(tpu: Callable[..., Any], default: Callable[..., Any], *arrays: Any) -> Any:
        kernel = getattr(tpu, "func", tpu).__module__ != layers.__name__  # else of XLA's ops
        return tpu(*arrays, interpret=True) if interpret and kernel else tpu(*arrays)

    def referred(*args: Any, **how: Any) -> jax.Array:
        on_tpu.note(on_tpu.Call("reference", 0.0, 0))
        return reference.attend(*args, **how)

    with monkeypatch.context() as patch, on_tpu.traced() as calls:
        patch.setattr(on_tpu, "either", taken)
        if not interpret:
            patch.setattr(tpu, "attend", referred)
            patch.setattr(append, "append", partial(choice._all_written, write))
        yield calls


def random_params(program: Any) -> dict[str, Any]:
    """f32 arrays of all parameters; a norm's are near 1."""
    rng = np.random.default_rng(0)

    def arrays(key: str, text: str) -> list[jax.Array]:
        spec = parse_spec(key, text)
        flat, scale = len(spec.shape) < 2, spec.shape[0] ** -0.5
        draw = [rng.standard_normal(spec.shape, np.float32) for _ in range(spec.stack or 1)]
        return [jnp.asarray(1 + 0.1 * x if flat else x * scale) for x in draw]

    out: dict[str, Any] = {}
    for key, entry in program.params.items():
        if isinstance(entry, str):
            out[key] = arrays(key, entry)[0]
        else:
            columns = {k: arrays(f"{key}.{k}", text) for k, text in entry.items()}
            count = max(map(len, columns.values()))
            out[key] = [{k: column[i] for k, column in columns.items() if i < len(column)} for i in range(count)]
    return out


def in_pieces(extend: Extend, params: Any, sizes: Sequence[int]) -> tuple[np.ndarray, Cache]:
    """Logits through a cache: after a prompt, single tokens and verifications."""
    call, out, start = jax.jit(extend), list[Any](), 0
    cache = empty_cache(cache_shapes(extend, params, len(TOKENS)), 32)
    for size in sizes:
        logits, cache = call(params, TOKENS[:, start : start + size], cache)
        out.append(logits)
        start += size
    return np.concatenate(out, axis=1), cache


def same(
    extend: Extend, params: Any, sizes: Sequence[int], monkeypatch: pytest.MonkeyPatch, interpret: bool = True
) -> list[on_tpu.Call]:
    """Checks that kernels change nothing but the last digits; gives their calls."""
    want, _ = in_pieces(extend, params, sizes)
    with forced(monkeypatch, interpret) as calls:
        have, _ = in_pieces(lambda *args: extend(*args), params, sizes)
    np.testing.assert_allclose(have, want, rtol=CLOSE, atol=CLOSE)
    return calls


@pytest.mark.parametrize(
    ("attributes", "sort", "width"),
    [
        ("cache=i8, window=3", "int8_window", 128),
        pytest.param("cache=i8", "int8", 128, marks=pytest.mark.slow),
        pytest.param("window=5, softcap=3.0", "f32_window_capped", 8, marks=pytest.mark.slow),
    ],
)
def test_an_emitted_program_means_the_same(
    attributes: str, sort: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TINY.replace("3 * f32", "1 * f32").replace("times=3", "times=1")
    program = load_program(emit(parse(text.replace("{scale=0.35", f"{{{attributes}, scale=0.35"))))
    calls = same(program.extend, random_params(program), [4, 1], monkeypatch)
    kept = f"{'int8' if 'int8' in sort else 'float32'}_4x32x{width}"
    assert {call.name.replace("append_2_", "append_") for call in calls} == {
        name for t in (1, 4) for name in (f"attention_{sort}_g2_r{2 * t}_d{width}_s32_b2_k32", f"append_{kept}_b2_t{t}")
    }


@pytest.mark.slow
@pytest.mark.parametrize("interpret", [True, False])
def test_routed_recursion_means_the_same(interpret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depths of their own lengths; the queries of a depth are those of its tokens."""
    text = ROUTED.replace("{scale=0.25}", "{scale=0.25, cache=i8}")
    module = runner.run(parse(text), Pipeline.parse("mor{router=expert,share=cycle,span=0-1}").ordered())[-1].after
    program = load_program(emit(module))
    assert same(program.extend, random_params(program), [3, 1], monkeypatch, interpret)


def grown() -> list[Any]:
    """Rows of a depth after 2 and 1 of four tokens, and after one more each; the last row is spare."""
    draw, lengths = np.random.default_rng(0), jnp.asarray([1, 3])
    entries, out = (Rows.of([jnp.zeros((2, 1, 2, 8))], "i8").empty(6),), []
    for count, valid in ((4, jnp.asarray([2, 1])), (1, jnp.asarray([1, 1]))):
        step = Gathered(count, valid, lengths, entries)
        out += step.append(jnp.asarray(draw.standard_normal((2, count, 2, 8)), jnp.float32))
        entries, lengths = step.entries(), lengths + valid
    return out


def test_rows_of_a_depth_are_written_where_its_tokens_end() -> None:
    """Codes and scales apart as codes with their scales behind them."""
    plain = grown()
    with on_tpu.traced():
        for have, want in zip(grown(), plain, strict=True):
            np.testing.assert_array_equal(have.decoded(2), want)


# -- early exits --------------------------------------------------------------------------------------------


def _matrices(count: int) -> list[jax.Array]:
    return list(jnp.asarray(np.random.default_rng(5).standard_normal((count, 16, 16)) / 4, jnp.float32))


def _heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], 2, 8)


def _keep(w: jax.Array, x: jax.Array, step: Step) -> tuple[Any, ...]:
    return step.append(_heads(x @ w), _heads(x @ w.T), cache="i8")


def _run(w: jax.Array, x: jax.Array, step: Step) -> jax.Array:
    keys, values = _keep(w, x, step)
    attended = layers.attention(_heads(x), keys, values, step.positions, scale=0.3)
    return layers.norm(x + attended.reshape(x.shape), kind="rms", eps=1e-5)


def _leaving(params: Any, tokens: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
    step, table = Step(tokens, cache), params[0]
    stack: Any = exits.Stack(params[2:], [params[1]], _run, _keep, lambda w, x: x @ w, lambda x: x @ table.T)
    logits, _ = exits.early(step, table[tokens % 16], stack, at=(1,), threshold=0.2)
    return logits, step.cache()


@pytest.mark.parametrize("interpret", HOW)
def test_leaving_early_means_the_same(interpret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that run in the turns of a loop, or keep codes and scales alone."""
    assert same(_leaving, _matrices(4), [3, 1], monkeypatch, interpret)


# -- one program for both ------------------------------------------------------------------------------------


def test_one_program_for_both_carries_both() -> None:
    """Lowered for this machine it runs XLA's ops; lowered for a TPU it carries the kernel."""
    params, sizes = _matrices(3), [3, 1]
    plain, _ = in_pieces(_leaving, params, sizes)
    with on_tpu.traced() as calls:
        both, cache = in_pieces(partial(_leaving), params, sizes)
        assert isinstance(cache.entries[0].values[0], Split)
        made = export.export(jax.jit(partial(_leaving)), platforms=("cpu", "tpu"))(params, TOKENS[:, :1], cache)
    assert calls and "tpu_custom_call" in made.mlir_module()
    np.testing.assert_allclose(both, plain, atol=1e-6)
