"""Embeddings and rotary tables in native regions: XLA's rows, of every kind of table; parts of arrays that went in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.runtime.kernels.region import native
from effc.runtime.layers import embed, linear, norm, rope, rope_table
from tests.runtime.test_region_kernel import VARIANTS, matrix, packed, rows

V, D = 70, 36
IDS = jnp.asarray([[0, 15, 16], [31, 32, V - 1]], jnp.int32)
KINDS = {
    "f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16,
    "int4": {"group": 12}, "int4 zeros": {"group": 12, "sym": False, "dtype": jnp.float32},
    "int8": {"bits": 8, "group": 0, "dtype": jnp.bfloat16}, "int3, short group": {"bits": 3, "group": 16},
}  # fmt: skip


def _table(kind: Any) -> Any:
    if isinstance(kind, dict):
        return packed(matrix(0, D, V, axis=-1, **kind))
    return rows(0, V, D).astype(kind)


def _read(ids: jax.Array, table: Any, w: jax.Array) -> jax.Array:
    return linear(embed(ids, table, dtype=jnp.float32), w)


@pytest.mark.parametrize("flags", VARIANTS, ids=["native", *native.VARIANTS])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_rows_are_xlas_to_the_bit(kind: Any, flags: tuple[str, ...]) -> None:
    table, w = _table(kind), jnp.eye(D, dtype=jnp.float32)
    call = jax.jit(native.regions(_read, flags))
    text = call.lower(IDS, table, w).as_text()
    assert text.count("custom_call @effc_region") == 1 and "gather" not in text
    wanted = embed(IDS, table, dtype=jnp.float32)
    np.testing.assert_array_equal(np.asarray(call(IDS, table, w)), np.asarray(wanted))


def test_numbers_that_are_not_there_read_nothing() -> None:
    """As `take` of floats has it: NaN; below 0 they count from the end."""
    ids, w = jnp.asarray([[-1, V, -V - 1]], jnp.int32), jnp.eye(D, dtype=jnp.float32)
    wanted = np.asarray(embed(ids, _table(jnp.float32)))
    for kind in (jnp.float32, {"group": 12}):
        found = np.asarray(jax.jit(native.regions(_read))(ids, _table(kind), w))
        assert (np.isnan(found) == np.isnan(wanted)).all() and np.isnan(found[0, 1:]).all()
    np.testing.assert_array_equal(np.asarray(jax.jit(native.regions(_read))(ids, _table(jnp.float32), w)), wanted)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_what_is_likeliest_is_read_on_in_the_same_call(shape: tuple[int, int]) -> None:
    x, w, table = rows(1, *shape, D), rows(2, D, V), packed(matrix(0, D, V, axis=-1, group=12))

    def function(x: jax.Array, w: jax.Array, table: Any) -> tuple[jax.Array, jax.Array]:
        logits = linear(x, w).reshape(-1, V)
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(shape)
        return chosen, _read(chosen, table, jnp.eye(D, dtype=jnp.float32))

    call = jax.jit(native.regions(function))
    text = call.lower(x, w, table).as_text()
    assert text.count("custom_call @effc_region") == 1 and "gather" not in text
    for got, want in zip(call(x, w, table), function(x, w, table), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_parts_of_an_array_are_read_where_they_lie() -> None:
    x, w = rows(1, 2, 3, 3 * D), rows(2, D, 16)

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        parts = [norm(x[..., i * D : (i + 1) * D], kind="rms", eps=1e-5) for i in range(3)]
        return sum((linear(part * (i + 1), w) for i, part in enumerate(parts)), jnp.zeros((), jnp.float32))

    call = jax.jit(native.regions(function))
    assert "slice" not in str(call.lower(x, w).compile().as_text())
    np.testing.assert_allclose(call(x, w), jax.jit(function)(x, w), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("freq", [None, rows(5, 8)], ids=["theta", "given"])
def test_rotary_tables_are_made_in_the_call(freq: jax.Array | None) -> None:
    positions, x, w = jnp.asarray([[0, 1, 9], [700, 8191, 5]], jnp.int32), rows(1, 2, 3, 32), jnp.eye(32)

    def function(positions: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        cos, sin = rope_table(positions, freq, dims=16, theta=1e4, scale=1.5)
        return rope(linear(x, w).reshape(2, 3, 2, 16), cos, sin)

    call = jax.jit(native.regions(function))
    text = call.lower(positions, x, w).as_text()
    assert text.count("custom_call @effc_region") == 1 and "cosine" not in text
    np.testing.assert_allclose(call(positions, x, w), jax.jit(function)(positions, x, w), atol=1e-5)
