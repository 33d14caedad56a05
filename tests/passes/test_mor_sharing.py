"""Sharing: index maps of the four strategies, what each array begins from, and what is refused."""

from __future__ import annotations

import pytest

from effc.passes.base import PassError
from effc.passes.mor.sharing import Folding, Share, chosen, fold, kept, spans, unique_parameters

TWELVE: dict[Share, tuple[int, ...]] = {
    "cycle": (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5),
    "sequence": (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5),
    "middle-cycle": (0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6),
    "middle-sequence": (0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6),
}


@pytest.mark.parametrize("share", TWELVE)
def test_twelve_layers_twice(share: Share):
    assert fold(12, 2, share, None).order() == TWELVE[share]


def test_the_published_example_of_fourteen_layers():
    order = fold(14, 2, "middle-cycle", None).order()
    assert order == (0, *range(1, 7), *range(1, 7), 7)


def test_a_span_of_ones_own():
    folding = fold(12, 3, "cycle", (2, 7))
    assert folding.order() == (0, 1, 2, 3, 2, 3, 2, 3, 4, 5, 6, 7)
    assert folding.unique == 8


@pytest.mark.parametrize(
    ("init", "made_of"),
    [
        ("stepwise", [(1,), (3,), (6,), (8,), (10,)]),
        ("even", [(2,), (4,), (6,), (7,), (9,)]),
        ("lower", [(1,), (2,), (3,), (4,), (5,)]),
        ("upper", [(6,), (7,), (8,), (9,), (10,)]),
        ("average", [(1, 6), (2, 7), (3, 8), (4, 9), (5, 10)]),
    ],
)
def test_what_the_shared_arrays_are_made_of(init, made_of):
    assert fold(12, 2, "middle-cycle", None).sources(init) == ((0,), *made_of, (11,))


def test_averages_of_a_sequence_are_of_neighbours():
    assert fold(6, 2, "sequence", None).sources("average") == ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize("share", TWELVE)
@pytest.mark.parametrize("recursions", [2, 3, 5])
def test_every_array_is_used_and_each_layer_takes_one(share: Share, recursions: int):
    folding = fold(17, recursions, share, None, resample=True)
    order = folding.order()
    assert len(order) == 17
    assert set(order) == set(range(folding.unique))
    assert len(folding.sources("stepwise")) == folding.unique


def test_uneven_depths_are_refused_with_the_mend():
    with pytest.raises(PassError, match=r"11 layers \(1 to 11 of 13\) do not divide into 2.*span=1-10") as caught:
        fold(13, 2, "middle-cycle", None)
    assert "uneven=true" in str(caught.value)
    assert fold(13, 2, "middle-cycle", None, resample=True).order() == (0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("layers", "recursions", "span", "told"),
    [
        (12, 1, None, "recursions=1, want 2 or more"),
        (12, 2, (3, 12), "span=3-12, want layers of 0 to 11"),
        (12, 2, (3, 3), "1 layer to fold into 2 recursions"),
        (2, 2, None, "want layers of 0 to 1"),
    ],
)
def test_what_cannot_be_folded(layers, recursions, span, told):
    with pytest.raises(PassError, match=told):
        fold(layers, recursions, "middle-cycle", span)


def test_the_spans_that_auto_ranks():
    assert spans(12, 2, "middle-cycle") == [(0, 9), (1, 10), (2, 11)]
    assert spans(12, 2, "cycle") == [(0, 11)]


def test_unique_parameters_by_formula():
    folding = fold(12, 2, "middle-cycle", None)
    assert unique_parameters(folding, 100) == 700
    assert unique_parameters(folding, 100, own=3) == 700 + 36
    assert unique_parameters(Folding(12, 0, 6, 2), 1) == 6


def test_what_auto_begins_from():
    assert (chosen("auto", 0), chosen("auto", 8), chosen("upper", 8)) == ("stepwise", "average", "upper")


def test_what_a_shallower_model_keeps():
    assert kept(range(12), 7) == [0, 2, 4, 6, 7, 9, 11]
    assert kept(range(5), 1) == [0]
