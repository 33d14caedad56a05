"""Routed recursion: emitted programs against the dense meaning, decoding against prefill, nothing from the future."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.stream import run
from effc.passes import runner
from effc.pipeline import Pipeline
from effc.runtime.cache import Cache, Step
from effc.runtime.engine import Engine
from effc.runtime.recursion import Depth, mean_depth, recurse
from effc.runtime.weights import load_params
from effc.weights import Lazy, Store, parts, write_safetensors

TINY = (Path(__file__).parents[1] / "passes" / "tiny.effc").read_text()
TOKENS = np.random.default_rng(3).integers(0, 160, (2, 40)).astype(np.int32)


def folded(passes: str) -> Module:
    module = parse(TINY.replace("2 * f32", "6 * f32").replace("times=2", "times=6"))
    return runner.run(module, Pipeline.parse(passes).ordered())[-1].after


def store_of(module: Module, router: float = 1.0) -> Store:
    """Random arrays; a router of 0 knows nothing."""

    def lazy(name: str) -> Lazy:
        param = module.params[name]
        part = parts(param.type)[""]

        def read(layer: int) -> Mapping[str, np.ndarray]:
            rng = np.random.default_rng([*name.encode(), layer])
            drawn = rng.standard_normal(part.shape).astype(np.float32)
            return {"": drawn * router if name == "routers.w" else 0.1 * drawn + (len(part.shape) == 1)}

        return Lazy(param, read)

    return Store({name: lazy(name) for name in module.params})


def engine(module: Module, store: Store, folder: Path) -> Engine:
    program = load_program(emit(module))
    (file,) = write_safetensors(folder / "w.safetensors", module, store)
    return Engine(program, load_params(file, program.params))


def in_pieces(machine: Engine, tokens: np.ndarray, sizes: list[int], room: int = 64) -> tuple[np.ndarray, Cache]:
    cache, out, start = machine.empty(len(tokens), room), list[Any](), 0
    for size in sizes:
        logits, cache = machine.extend(jnp.asarray(tokens[:, start : start + size]), cache)
        out.append(np.asarray(logits))
        start += size
    return np.concatenate(out, axis=1), cache


ROUTED = ["mor{router=expert}", "mor{router=expert,kv=shared}", "mor{router=token,share=cycle,recursions=3}"]


@pytest.mark.parametrize("passes", ROUTED)
def test_emitted_is_the_dense_meaning_and_decoding_is_prefill(passes: str, tmp_path: Path) -> None:
    module = folded(passes)
    store = store_of(module)
    wanted = np.asarray(run(module, store, jnp.asarray(TOKENS)))
    machine = engine(module, store, tmp_path)
    whole = np.asarray(machine.forward(machine.params, jnp.asarray(TOKENS)))
    np.testing.assert_allclose(whole, wanted, rtol=3e-4, atol=3e-4)
    pieces, cache = in_pieces(machine, TOKENS, [24, 1, 1, 8, 1, 5])
    np.testing.assert_allclose(pieces, wanted, rtol=3e-4, atol=3e-4)
    assert 1 < float(mean_depth(cache)) < 3


def test_later_tokens_move_nothing_before_them(tmp_path: Path) -> None:
    module = folded("mor{router=expert,capacity=0.3}")
    machine = engine(module, store_of(module), tmp_path)
    changed = TOKENS.copy()
    changed[:, 20:] = 7
    one, two = (np.asarray(machine.forward(machine.params, jnp.asarray(t))) for t in (TOKENS, changed))
    np.testing.assert_array_equal(one[:, :20], two[:, :20])
    assert np.abs(one[:, 20:] - two[:, 20:]).max() > 0.01


def test_padding_is_not_routed(tmp_path: Path) -> None:
    module = folded("mor{router=expert}")
    machine = engine(module, store_of(module), tmp_path)
    ragged = [17, 9]
    logits, cache = machine.extend(jnp.asarray(TOKENS[:, :24]), machine.empty(2, 64), jnp.asarray(ragged))
    following, _ = machine.extend(jnp.asarray(TOKENS[:, 30:31]), cache)
    for row, length in enumerate(ragged):
        alone = np.concatenate([TOKENS[row, :length], TOKENS[row, 30:31]])[None]
        wanted = np.asarray(machine.forward(machine.params, jnp.asarray(alone)))[0]
        np.testing.assert_allclose(logits[row, 0], wanted[-2], rtol=3e-4, atol=3e-4)
        np.testing.assert_allclose(following[row, 0], wanted[-1], rtol=3e-4, atol=3e-4)


def test_a_full_capacity_is_the_plain_recursion(tmp_path: Path) -> None:
    plain, full = folded("mor"), folded("mor{router=expert,capacity=1}")
    store = store_of(full)
    np.testing.assert_allclose(
        run(full, store, jnp.asarray(TOKENS)), run(plain, store, jnp.asarray(TOKENS)), rtol=1e-5, atol=1e-5
    )


def test_a_decoded_token_copies_no_cache(tmp_path: Path) -> None:
    module = folded("mor{router=expert}")
    machine = engine(module, store_of(module), tmp_path)
    cache, token = machine.empty(1, 1000), jnp.zeros((1, 1), jnp.int32)
    compiled = jax.jit(machine.program.extend, donate_argnums=2).lower(machine.params, token, cache).compile()
    kept = {f"f32[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(cache) if x.ndim == 3}
    copies = [
        line for line in str(compiled.as_text()).splitlines() if " copy(" in line and any(k in line for k in kept)
    ]
    assert len(kept) == 2
    assert not copies


def test_memory_is_what_the_formula_says(tmp_path: Path) -> None:
    """(N+1)/(2N) of the keys of a plain recursion where depths keep their own, 1/N where they share the first's."""

    def rows(passes: str) -> int:
        module = folded(passes)
        machine = engine(module, store_of(module), tmp_path)
        cache = machine.empty(1, 1024)
        deep = [entry for entry in cache.entries if isinstance(entry, Depth)]
        return sum(x.size for x in jax.tree.leaves([e.entries for e in deep])) + sum(
            x.size for e in cache.entries if not isinstance(e, Depth) for x in e.values
        )

    full = rows("mor{share=cycle,recursions=3}")
    own = rows("mor{share=cycle,recursions=3,router=expert}")
    assert own / full == pytest.approx(4 / 6, abs=0.015)  # and 16 rows of slack and a spare one a depth
    assert rows("mor{share=cycle,recursions=3,router=expert,kv=shared}") / full == pytest.approx(1 / 3)


X = jnp.asarray(np.random.default_rng(4).standard_normal((2, 16, 5)), jnp.float32)
"""States [b,t,d]."""
W = jnp.asarray(np.random.default_rng(6).standard_normal((5, 5)), jnp.float32)


def moves(_depth: int, _step: object, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ W)


def test_a_token_that_does_not_go_on_stays_as_it_is_bit_for_bit() -> None:
    router = W[:1]
    once = moves(0, None, X)
    on = jax.nn.sigmoid(once @ router[0]) > 0.5
    assert 0 < int(on.sum()) < on.size
    found = recurse(Step(jnp.zeros((2, 16), jnp.int32)), moves, router, X, times=2, capacity=(1.0, 0.5))
    np.testing.assert_array_equal(found[~on], once[~on])
    np.testing.assert_allclose(found[on], moves(1, None, once)[on], rtol=1e-5)


@pytest.mark.parametrize("gate", ["delta", "paper"])
def test_the_two_forms_of_the_gate_are_what_they_say_and_differ(gate: str) -> None:
    router, alpha, step = jnp.ones((1, 5)), 0.5, Step(jnp.zeros((2, 16), jnp.int32))
    found = recurse(step, moves, router, X, times=2, capacity=(1.0, 0.5), gate=gate, alpha=alpha)
    once = moves(0, None, X)
    g = alpha * jax.nn.sigmoid(once.sum(-1, keepdims=True))
    moved = once + g * (moves(1, None, once) - (once if gate == "delta" else 0))
    np.testing.assert_allclose(found, jnp.where(g > 0.25, moved, once), rtol=1e-5, atol=1e-6)
