"""The same operation however a program writes it: raised, rolled, and equal to the program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from effc.errors import EffcError
from effc.frontend import lower
from effc.frontend.check import check
from effc.ir.core import walk
from tests.conformance.checks import Case, decoding, logits
from tests.conformance.models import Model
from tests.passes.raising import small
from tests.passes.raising.small import Way

WAYS = {
    "scattered": Way(small.by_scatter),
    "complex-table": Way(small.by_complex),
    "complex-exponential": Way(small.by_exponential, repeat_first=True),
    "one-hot-learned-bias": Way(embed=small.one_hot, bias=small.relative_one_hot),
    "sinusoids-learned-bias": Way(embed=small.sinusoids, bias=small.relative),
    "curved-bias": Way(bias=small.curved),
    "padded": Way(hide=small.padded),
    "blinded": Way(hide=small.blinded),
    "packed": Way(hide=small.packed),
    "forgetful": Way(hide=small.forgetful),
    "far-seen": Way(hide=small.far_seen),
}
SAMPLE = {"complex-table", "curved-bias", "scattered", "packed", "forgetful"}
LEFT = {"lax.dot_general", "lax.rsqrt", "lax.exp", "lax.gather", "lax.scatter", "window"}


@pytest.fixture(autouse=True)
def usual_promotion() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def sampled(names: Iterable[str]) -> list[Any]:
    """The default run takes a sample; the rest is slow."""
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", sampled(WAYS))
def test_raised_rolled_and_equal(name: str) -> None:
    way = WAYS[name]
    source = small.source(way)
    low = lower(source)
    assert low.notes == []
    layer = low.module.funcs["layer"]
    found = Counter(op.kind for op in layer.ops)
    assert found["attention"] == 1
    assert found["rope"] == (0 if way.turn is small.unturned else 2)
    left = LEFT - {"lax.exp"} if way.hide is small.forgetful else LEFT  # its gates are exponentials
    assert not left & {op.kind for func in low.module.funcs.values() for op in func.ops}
    (attention,) = (op for op in layer.ops if op.kind == "attention")
    assert layer.types()[attention.inputs[1]].shape[2] == 2  # heads are shared, not repeated
    plain = way.bias is small.unbiased and way.hide is small.earlier
    assert ("bias" in attention.regions) == (not plain)
    check(low, source)


@pytest.mark.parametrize("name", sampled(["blinded", "packed", "forgetful", "far-seen"]))
def test_masks_of_tokens_decode_in_ragged_batches(name: str, tmp_path: Path) -> None:
    case = Case(Model("own", lambda: small.source(WAYS[name]), 2), tmp_path)
    logits(case)
    decoding(case)


def test_what_sees_later_tokens_is_refused() -> None:
    with pytest.raises(EffcError, match="not causal"):
        lower(small.source(Way(hide=small.ahead)))


def test_a_mask_of_shifted_tokens_keeps_a_row_too() -> None:
    source = small.source(Way(hide=small.before))
    low = lower(source)
    (attention,) = (op for op in walk(low.module.funcs["layer"]) if op.kind == "attention")
    assert attention.attrs["keyed"] == 1
    (shift,) = (op for op in walk(low.module.forward()) if op.kind == "window")
    assert shift.attrs["lookback"] == 1
    check(low, source)


def test_each_layer_reads_its_own_learned_bias() -> None:
    module = lower(small.source(WAYS["sinusoids-learned-bias"])).module
    (attention,) = (op for op in walk(module.funcs["layer"]) if op.kind == "attention")
    tables = [op for op in module.funcs["layer"].ops if op.kind == "param" and op.out.name in attention.inputs]
    assert [module.params[op.params["value"]].stack for op in tables] == [2]
