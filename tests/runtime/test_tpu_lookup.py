"""The TPU kernel that takes rows of a table of codes, in interpret mode, against its reference."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from effc.runtime import layers
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.lookup import reference, tpu
from effc.runtime.qarray import QArray

CASES = st.tuples(
    st.integers(1, 200), st.sampled_from([8, 48, 128]), st.integers(1, 5), st.sampled_from(["int8", "int4"]),
    st.integers(0, 2**31),
)  # fmt: skip


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(CASES)
def test_it_takes_the_rows(case: tuple[int, int, int, str, int]) -> None:
    vocab, width, count, dtype, seed = case
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(-8, 8, (vocab, width)), dtype)
    ids = jnp.asarray(rng.integers(0, vocab, count), jnp.int32).at[0].set(vocab - 1)
    assert tpu.fits(codes)
    np.testing.assert_array_equal(tpu.rows(codes, ids, interpret=True), reference.rows(codes, ids))


@pytest.mark.parametrize("zeros", [False, True])
def test_an_embedding_means_the_same(zeros: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    codes, scales = jnp.asarray(rng.integers(-127, 128, (40, 64)), jnp.int8), rng.uniform(0.5, 1, (40, 2))
    shift = jnp.asarray(rng.integers(-3, 3, (40, 2)), jnp.float16) if zeros else None
    table = QArray(codes, jnp.asarray(scales, jnp.float16), shift, 8, 32, -1, 64)
    ids = jnp.asarray([[3, 39, 3], [0, 1, 17]], jnp.int32)
    want = layers.embed(ids, table)
    with monkeypatch.context() as patch, on_tpu.traced() as calls:
        patch.setattr(on_tpu, "either", lambda tpu, default, *arrays: tpu(*arrays, interpret=True))
        have = layers.embed(ids, table)
    assert [call.name for call in calls] == ["lookup_int8_40x64_n6"]
    np.testing.assert_array_equal(have, want)
