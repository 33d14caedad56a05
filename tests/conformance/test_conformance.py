"""Models written elsewhere, lowered untouched: raised, rolled, equal, decoded, quantized."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from tests.conformance.checks import CHECKS, Case
from tests.conformance.models import MODELS, SAMPLE

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages written elsewhere


@pytest.fixture(autouse=True, scope="module")
def usual_promotion() -> Iterator[None]:
    """As in programs that never heard of this project's stricter tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


def _models() -> list[object]:
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in MODELS]


@pytest.fixture(scope="module", params=_models())
def case(request: pytest.FixtureRequest, usual_promotion: None, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(MODELS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("check", CHECKS)
def test_model(case: Case, check: str, request: pytest.FixtureRequest) -> None:
    reason = dict(case.model.failing).get(check)
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    CHECKS[check](case)
