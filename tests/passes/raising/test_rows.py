"""What attention reads of tokens: what the verifier wants of it, and beside native regions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.frontend import lower
from effc.frontend.blind import blind
from effc.ir import dump, parse
from effc.ir.analysis import cache_bytes_per_token
from effc.ir.verify import verify
from effc.runtime.cache import cache_shapes, empty_cache
from effc.runtime.kernels.region import native
from tests.conformance.checks import Case, quantized
from tests.conformance.models import Model
from tests.passes.raising import small
from tests.passes.raising.small import Way


@pytest.fixture(autouse=True)
def usual_promotion() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


TEXT = """effc 1
module @m {
  meta { vocab=9 }
  func @forward(%tokens: i32[b,t], %q: f32[b,t,4,8], %seen: bool[b,t], %table: f32[4]) {
    %a: f32[b,t,4,8] = attention(%q, %q, %q, %seen, %table) {mask=region, ATTRS} bias(%i: i32[], %j: i32[], %h: i32[], ROW, %x: f32[4]) {
      %c: f32[] = const() {value=0.0}
      return %c
    }
    return %a
  }
  decode greedy { forward=@forward }
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("attrs", "row", "fault"),
    [
        ("keyed=1", "%k: bool[]", ""),
        ("asked=1", "%k: bool[]", ""),
        ("keyed=1", "%k: i32[]", "region 'bias' takes"),
        ("keyed=0", "%k: bool[]", "region 'bias' takes"),
        ("keyed=2", "%k: bool[]", "rows of f32[4], want one for each token"),
        ("keyed=2, asked=1", "%k: bool[]", "keyed=2, asked=1 of 2 operands"),
    ],
)
def test_operands_of_the_region_are_verified(attrs: str, row: str, fault: str) -> None:
    faults = verify(parse(TEXT.replace("ATTRS", attrs).replace("ROW", row)))
    assert [fault in found.message for found in faults] == ([True] if fault else [])


def test_rows_are_text_are_counted_and_may_leave_a_query_blind() -> None:
    low = lower(small.source(Way(hide=small.blinded)))
    assert parse(dump(low.module)) == low.module
    assert cache_bytes_per_token(low.module) == 2 * (2 * 2 * small.HEAD * 4 + 1)  # k and v of two heads, a flag
    ids = np.array([[3, 0, 5, 0], [0, 1, 2, 3]], np.int32)
    assert (blind(low.module, low.store, ids) == (ids == 0)).all()


def test_beside_native_regions(tmp_path: Path) -> None:
    if not native.usable():
        pytest.skip("no compiler")
    case = Case(Model("own", lambda: small.source(Way(hide=small.forgetful)), 2), tmp_path)
    program, params = case.written(*quantized(case), "coded")
    steps = []
    for extend, weights in ((program.extend, params), (native.regions(program.extend), native.packed(params))):
        run, cache = jax.jit(extend), empty_cache(cache_shapes(program.extend, params, 3), 20)
        _, cache = run(weights, jnp.asarray(case.tokens[:, :9]), cache)
        steps.append(np.asarray(run(weights, jnp.asarray(case.tokens[:, 9:10]), cache)[0]))
    assert np.abs(steps[0] - steps[1]).max() <= 2e-3 * np.abs(steps[0]).max()
